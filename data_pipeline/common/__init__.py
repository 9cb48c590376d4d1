"""What every room uses: errors, thread pools, ordered parallel work, progress. Imports no other room."""
