"""Answers of models, parsed: content, reasoning and tool calls, from text that arrives in pieces. Pure."""
