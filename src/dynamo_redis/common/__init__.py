"""What workers written for Dynamo import from `dynamo.common`."""
