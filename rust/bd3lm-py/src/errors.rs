//! Each variant of the core's error enum becomes one class of `bd3lm.errors`.

use bd3lm_core::Error;
use pyo3::PyErr;

mod classes {
    use pyo3::import_exception;
    import_exception!(bd3lm.errors, ConfigError);
    import_exception!(bd3lm.errors, MissingFileError);
    import_exception!(bd3lm.errors, ExistsError);
    import_exception!(bd3lm.errors, FormatError);
    import_exception!(bd3lm.errors, EmptyCorpusError);
    import_exception!(bd3lm.errors, TokenizerError);
    import_exception!(bd3lm.errors, NotADatasetError);
    import_exception!(bd3lm.errors, TruncatedError);
    import_exception!(bd3lm.errors, CorruptError);
    import_exception!(bd3lm.errors, TokenOutOfRangeError);
    import_exception!(bd3lm.errors, DiskFullError);
    import_exception!(bd3lm.errors, StorageError);
}

/// Turns a core error into the Python exception of its cause.
pub fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Config {
            field,
            value,
            allowed,
        } => classes::ConfigError::new_err((field, value, allowed)),
        Error::Missing { .. } => classes::MissingFileError::new_err(message),
        Error::Exists { .. } | Error::Busy { .. } => classes::ExistsError::new_err(message),
        Error::Format { .. } | Error::Record { .. } => classes::FormatError::new_err(message),
        Error::EmptyCorpus { .. } | Error::EmptySplit { .. } => {
            classes::EmptyCorpusError::new_err(message)
        }
        Error::Tokenizer { .. } => classes::TokenizerError::new_err(message),
        Error::NotADataset { .. } => classes::NotADatasetError::new_err(message),
        Error::Truncated { .. } => classes::TruncatedError::new_err(message),
        Error::Corrupt { .. } => classes::CorruptError::new_err(message),
        Error::TokenOutOfRange { .. } => classes::TokenOutOfRangeError::new_err(message),
        Error::DiskFull { .. } => classes::DiskFullError::new_err(message),
        Error::Io { .. } => classes::StorageError::new_err(message),
    }
}
