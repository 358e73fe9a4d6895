"""The names that workers written for Dynamo import from `dynamo.common`."""
