"""Connections through a broker, for planes whose peers do not dial each other."""
