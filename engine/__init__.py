"""What computes: the one loop that drives anything iterative, training, evaluation, precision, several processes."""
