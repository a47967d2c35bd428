"""What the bench job measures, one module for each section; they import the package and are no part of it."""
