"""Programs that set things up or show them. Run as files, imported by their tests."""
