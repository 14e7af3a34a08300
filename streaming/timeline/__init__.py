"""From hypotheses to messages: transcript, sound events, emotion. Pure: no socket, no tensor, no clock."""
