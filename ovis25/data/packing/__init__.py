"""Several samples to a row of the batch: which ones (`balance`), and the dataset of such rows (`rows`)."""
