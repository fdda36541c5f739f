"""What a person sees: live progress, summaries, tables."""
