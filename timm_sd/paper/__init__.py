"""The method of Huang et al. (2016) and its networks."""
