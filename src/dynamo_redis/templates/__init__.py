"""Chat templates, and the process that renders them. It imports little else of the package."""
