"""The same graph of jobs in the words of other schedulers: files to look at and to hand over with their own tools."""
