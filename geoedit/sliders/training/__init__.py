"""A slider taught: tasks, the loop, and what makes a run durable."""
