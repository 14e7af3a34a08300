"""What is heard besides words: YAMNet, and a small head on what it says over time."""
