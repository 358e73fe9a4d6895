"""The forms in which the APIs answer: whole, as a stream of events, and as errors."""
