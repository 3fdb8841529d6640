"""One file per question; results with date, hardware and versions in results/."""
