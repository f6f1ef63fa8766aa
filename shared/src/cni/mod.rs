//! The CNI specification's types: environment, network configuration, result, error.
