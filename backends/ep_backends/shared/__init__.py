"""What the backends of several engines share; nothing here knows an engine."""
