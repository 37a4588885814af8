"""Speed measurements, and the plain loops they are measured against."""
