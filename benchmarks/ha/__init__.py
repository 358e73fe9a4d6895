"""The suite `start`: start, idle cost and limits of a deployment."""
