"""Sound event detection (SED): YAMNet, and a small head over its embeddings in time."""
