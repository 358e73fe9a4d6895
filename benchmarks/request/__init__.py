"""The suite `request`: the request plane beside its rivals."""
