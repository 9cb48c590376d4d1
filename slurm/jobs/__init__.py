"""What any scheduler needs: jobs, their graph, the code frozen for them, and what became of them. Imports nothing else
of `slurm`."""
