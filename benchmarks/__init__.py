"""What the bench job measures, one module a subject; they stand above the jobs, whose parts they time."""
