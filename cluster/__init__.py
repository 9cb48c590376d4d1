"""What any scheduler needs: jobs, their graph, the code frozen for them, and what became of them. `slurm` imports it;
only `cluster.commands` imports `slurm`."""
