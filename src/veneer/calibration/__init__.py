"""What `veneer.calibrate` collects, one kind of statistic a file, and how inputs reach it."""
