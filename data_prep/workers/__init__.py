"""Who does the units: processes of one machine, MPI ranks, tasks of a job array."""
