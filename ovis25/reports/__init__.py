"""Pictures and pages made from the numbers of a run; nothing of the package is needed for them."""
