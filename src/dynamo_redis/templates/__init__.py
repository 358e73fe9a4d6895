"""Chat templates, and the process that renders them. Little else of the package is imported here."""
