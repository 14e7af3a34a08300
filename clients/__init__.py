"""Programs that talk to a server. They import `streaming.protocol` and nothing else of ours."""
