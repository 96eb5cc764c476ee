"""Text in, text out: one answer, or a conversation that keeps its session."""
