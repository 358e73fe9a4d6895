"""Parts that all suites share: options, processes, reports."""
