//! One text column of a parquet file, a page at a time.
//!
//! Memory holds the pages that are being read: one of each column, decompressed. Texts are slices
//! of their page, so they add nothing but the one that is handed on.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::basic::Type as Physical;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArrayType, DataType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::MAX_DOCUMENT;
use super::record::{Value, list};
use super::sink::Sink;
use crate::error::{Error, Result};

/// Bytes of texts that are taken from a page at a time.
const TOGETHER: usize = 1 << 20;
/// The most of them.
const ROWS_TOGETHER: usize = 256;

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    SerializedFileReader::new(file).map_err(|e| broken(path, &e))
}

fn broken(path: &Path, e: &ParquetError) -> Error {
    Error::Format {
        path: path.into(),
        reason: format!("not a readable parquet file ({e})"),
    }
}

/// Number of rows of a parquet file.
///
/// # Errors
/// A file that is missing or no parquet.
pub fn num_rows(path: &Path) -> Result<u64> {
    Ok(open(path)?.metadata().file_metadata().num_rows().max(0) as u64)
}

/// Reads the text column of a file.
pub(super) fn read(path: &Path, read: &Arc<AtomicU64>, sink: &mut Sink<'_>) -> Result<()> {
    let length = path.metadata().map_err(|e| Error::io(path, e))?.len();
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let text = column(path, &schema, &sink.options.text_field)?;
    if schema.column(text).physical_type() != Physical::BYTE_ARRAY {
        return Err(Error::Record {
            path: path.into(),
            record: 1,
            reason: format!("its field {} is not a string", sink.options.text_field),
        });
    }
    let filter = match &sink.options.filter {
        Some((field, value)) => Some((column(path, &schema, field)?, value)),
        None => None,
    };
    let total = reader.metadata().file_metadata().num_rows().max(1) as u64;
    let mut progress = Progress {
        read,
        length,
        total,
        rows: 0,
    };
    for index in 0..reader.num_row_groups() {
        if sink.is_done() {
            break;
        }
        let group = reader.get_row_group(index).map_err(|e| broken(path, &e))?;
        let rows = group.metadata().num_rows().max(0) as u64;
        if sink.skip(rows) {
            progress.add(rows);
            continue;
        }
        read_group(&*group, text, filter, sink, &mut progress).map_err(|e| e.at(path))?;
    }
    Ok(())
}

/// Rows as bytes of the file: its columns are not read in order.
struct Progress<'a> {
    read: &'a AtomicU64,
    length: u64,
    total: u64,
    rows: u64,
}

impl Progress<'_> {
    fn add(&mut self, rows: u64) {
        let at = |rows: u64| {
            let share = u128::from(self.length) * u128::from(rows.min(self.total));
            (share / u128::from(self.total)) as u64
        };
        let before = at(self.rows);
        self.rows = self.rows.saturating_add(rows);
        self.read
            .fetch_add(at(self.rows) - before, Ordering::Relaxed);
    }
}

/// Either the file is damaged, or the documents were refused.
enum Failed {
    File(ParquetError),
    Other(Error),
}

impl Failed {
    fn at(self, path: &Path) -> Error {
        match self {
            Failed::File(e) => broken(path, &e),
            Failed::Other(e) => e,
        }
    }
}

impl From<ParquetError> for Failed {
    fn from(e: ParquetError) -> Self {
        Failed::File(e)
    }
}

impl From<Error> for Failed {
    fn from(e: Error) -> Self {
        Failed::Other(e)
    }
}

fn read_group(
    group: &dyn RowGroupReader,
    text: usize,
    filter: Option<(usize, &String)>,
    sink: &mut Sink<'_>,
    progress: &mut Progress<'_>,
) -> std::result::Result<(), Failed> {
    let mut texts = get_typed_column_reader::<ByteArrayType>(group.get_column_reader(text)?);
    let level = |column: usize| {
        group
            .metadata()
            .schema_descr()
            .column(column)
            .max_def_level()
    };
    let mut filter = match filter {
        Some((column, wanted)) => Some((group.get_column_reader(column)?, level(column), wanted)),
        None => None,
    };
    let text_level = level(text);
    let mut together = 1;
    loop {
        let rows = next(&mut texts, together, text_level)?;
        if rows.is_empty() || sink.is_done() {
            return Ok(());
        }
        let kept = match &mut filter {
            Some((reader, level, wanted)) => matching(reader, *level, rows.len(), wanted)?,
            None => Vec::new(),
        };
        let mut bytes = 0;
        for (index, row) in rows.iter().enumerate() {
            progress.add(1);
            if !sink.begin()? {
                continue;
            }
            if kept.get(index) == Some(&false) {
                sink.filtered();
                continue;
            }
            let Some(value) = row else {
                sink.null();
                continue;
            };
            bytes += value.len();
            if value.len() > MAX_DOCUMENT {
                sink.bad(super::json::too_long())?;
                continue;
            }
            match str::from_utf8(value.data()) {
                Ok(text) => sink.text(text)?,
                Err(e) => sink.bad(format!("not valid UTF-8 (byte {} of it)", e.valid_up_to()))?,
            }
        }
        together = if bytes > TOGETHER {
            1
        } else {
            (2 * together).min(ROWS_TOGETHER)
        };
    }
}

/// Values of the next rows, `None` for null; none at the end of the column.
fn next<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    nullable: i16,
) -> std::result::Result<Vec<Option<T::T>>, ParquetError> {
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    let (records, _, _) = reader.read_records(rows, Some(&mut levels), None, &mut values)?;
    if nullable == 0 {
        return Ok(values.into_iter().map(Some).collect());
    }
    let mut values = values.into_iter();
    let mut out = Vec::with_capacity(records);
    for level in levels {
        out.push(if level == nullable {
            values.next()
        } else {
            None
        });
    }
    Ok(out)
}

/// Marks those of the next rows of a column that have the wanted value.
fn matching(
    reader: &mut ColumnReader,
    level: i16,
    rows: usize,
    wanted: &str,
) -> std::result::Result<Vec<bool>, ParquetError> {
    fn each<T: DataType>(
        reader: &mut ColumnReaderImpl<T>,
        level: i16,
        rows: usize,
        wanted: &str,
        value: impl Fn(&T::T) -> Value<'_>,
    ) -> std::result::Result<Vec<bool>, ParquetError> {
        let mut found = Vec::with_capacity(rows);
        while found.len() < rows {
            let values = next(reader, rows - found.len(), level)?;
            if values.is_empty() {
                return Err(ParquetError::EOF("a column ends before another".into()));
            }
            let is = |row: &Option<T::T>| match row {
                Some(row) => value(row).is(wanted),
                None => Value::Null.is(wanted),
            };
            found.extend(values.iter().map(is));
        }
        Ok(found)
    }
    fn text(bytes: &[u8]) -> Value<'_> {
        str::from_utf8(bytes).map_or(Value::Other, |text| Value::Text(text.into()))
    }
    macro_rules! matching {
        ($reader:ident, $value:expr) => {{ each($reader, level, rows, wanted, $value) }};
    }
    match reader {
        ColumnReader::ByteArrayColumnReader(r) => matching!(r, |v| text(v.data())),
        ColumnReader::FixedLenByteArrayColumnReader(r) => matching!(r, |v| text(v.data())),
        ColumnReader::BoolColumnReader(r) => matching!(r, |v| Value::Bool(*v)),
        ColumnReader::Int32ColumnReader(r) => matching!(r, |v| Value::Signed(i64::from(*v))),
        ColumnReader::Int64ColumnReader(r) => matching!(r, |v| Value::Signed(*v)),
        ColumnReader::DoubleColumnReader(r) => matching!(r, |v| Value::Float(*v)),
        // The number as it is written, not its nearest double.
        ColumnReader::FloatColumnReader(r) => matching!(r, |v| {
            Value::Float(v.to_string().parse().unwrap_or(f64::NAN))
        }),
        ColumnReader::Int96ColumnReader(r) => matching!(r, |_| Value::Other),
    }
}

/// The leaf column of a dotted name.
fn column(path: &Path, schema: &SchemaDescriptor, name: &str) -> Result<usize> {
    let refuse = |reason: String| Error::Format {
        path: path.into(),
        reason,
    };
    let names: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
    let found = names
        .iter()
        .position(|n| n == name)
        .or_else(|| names.iter().position(|n| n.eq_ignore_ascii_case(name)));
    let is_list = |index: usize| schema.column(index).max_rep_level() > 0;
    if let Some(index) = found.filter(|index| !is_list(*index)) {
        return Ok(index);
    }
    let below = |n: &String| {
        n.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    if found.is_some() || (0..names.len()).any(|i| is_list(i) && below(&names[i])) {
        return Err(refuse(format!(
            "its column {name} is a list: must be one value a record"
        )));
    }
    let count = names.len();
    Err(refuse(format!(
        "it has no column {name}, only {}; name another with --text-field",
        list(names.into_iter(), count)
    )))
}
