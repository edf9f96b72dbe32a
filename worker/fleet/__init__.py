"""Many projects, many machines: visits handed out by procrastinate, from a control database."""
