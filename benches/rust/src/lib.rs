//! Shared inputs of the criterion benches under `benches/`.
