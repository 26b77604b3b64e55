"""Who does the units: processes of one machine, MPI ranks, or tasks of a job array."""
