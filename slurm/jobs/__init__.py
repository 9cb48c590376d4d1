"""What any scheduler needs: jobs, their graph, their frozen code, and the records of what became of them. Imports
nothing else from `slurm`."""
