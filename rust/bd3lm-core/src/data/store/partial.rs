//! A directory that is made under another name, and takes its own when it is whole.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::{BIN, IDX, MANIFEST, TOKENIZER};
use crate::error::{Error, Result};

/// Name of the partial directory inside an empty directory that the user made.
const INSIDE: &str = ".partial";

/// Names that a commit moves out of the partial directory; the manifest is last.
const MOVED: [&str; 6] = ["train", "valid", BIN, IDX, TOKENIZER, MANIFEST];

/// A directory in the making, locked for the life of the process.
///
/// Where the target does not exist, the partial directory is its hidden sibling and is renamed in
/// the end. An empty directory that exists (a mount point, the current directory, the end of a
/// link) is kept: the partial directory lies in it, and its files are moved up, the manifest last.
/// Every file and directory is on the disk before it takes its name. A partial directory that a
/// killed process left behind is replaced.
#[derive(Debug)]
pub struct Partial {
    target: PathBuf,
    path: PathBuf,
    inside: bool,
    /// Holds the lock.
    _lock: File,
    /// Parents of the target that did not exist, the lowest first.
    made: Vec<PathBuf>,
    whole: bool,
}

impl Partial {
    /// Begins a directory.
    ///
    /// # Errors
    /// [`Error::Exists`] where the target holds something, [`Error::Busy`] where another process
    /// is making it.
    pub fn create(target: &Path) -> Result<Self> {
        let io_error = |e| Error::io(target, e);
        let inside = target.is_dir();
        if !inside && fs::symlink_metadata(target).is_ok() {
            return Err(Error::Exists {
                path: target.into(),
            });
        }
        let mut made = Vec::new();
        let path = if inside {
            target.join(INSIDE)
        } else {
            // `x/..` and the like have no name of their own, but then they exist.
            let name = target
                .file_name()
                .ok_or_else(|| io_error(io::ErrorKind::InvalidInput.into()))?;
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(".partial");
            let above = target.ancestors().skip(1);
            made.extend(
                above
                    .take_while(|p| !p.as_os_str().is_empty() && !p.exists())
                    .map(Path::to_path_buf),
            );
            target.with_file_name(hidden)
        };
        let lock = match claim(&path, target) {
            Ok(lock) => lock,
            Err(e) => {
                remove_empty(&made);
                return Err(e);
            }
        };
        let partial = Partial {
            target: target.into(),
            path,
            inside,
            _lock: lock,
            made,
            whole: false,
        };
        if inside {
            partial.take_over()?;
        } else if fs::symlink_metadata(target).is_ok() {
            // Another process finished it meanwhile.
            return Err(Error::Exists {
                path: target.into(),
            });
        }
        Ok(partial)
    }

    /// Removes the files of a killed commit from the target, and checks that it is empty.
    fn take_over(&self) -> Result<()> {
        let entries = |path: &Path| -> Result<Vec<PathBuf>> {
            let entries = fs::read_dir(path).map_err(|e| Error::io(path, e))?;
            entries
                .map(|e| e.map(|e| e.path()).map_err(|e| Error::io(path, e)))
                .collect()
        };
        if self.path.join(COMMITTING).exists() {
            for name in MOVED {
                remove(&self.target.join(name)).map_err(|e| Error::io(&self.target, e))?;
            }
        }
        for path in entries(&self.path)? {
            remove(&path).map_err(|e| Error::io(&path, e))?;
        }
        match entries(&self.target)?.iter().any(|p| *p != self.path) {
            true => Err(Error::Exists {
                path: self.target.clone(),
            }),
            false => Ok(()),
        }
    }

    /// Folder that the files go to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the directory its name; the files in it are on the disk already.
    ///
    /// # Errors
    /// A failing disk, or a target that another process made meanwhile.
    pub fn commit(mut self) -> Result<()> {
        sync(&self.path)?;
        if self.inside {
            self.move_up()?;
        } else {
            fs::rename(&self.path, &self.target).map_err(|e| match e.kind() {
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => Error::Exists {
                    path: self.target.clone(),
                },
                _ => Error::io(&self.target, e),
            })?;
        }
        self.whole = true;
        let above = self.target.parent().filter(|p| !p.as_os_str().is_empty());
        sync(above.unwrap_or(Path::new(".")))?;
        // A parent that is new has a name to keep, too.
        for parent in &self.made {
            let above = parent.parent().filter(|p| !p.as_os_str().is_empty());
            sync(above.unwrap_or(Path::new(".")))?;
        }
        Ok(())
    }

    fn move_up(&self) -> Result<()> {
        let fail = |e| Error::io(&self.target, e);
        File::create(self.path.join(COMMITTING)).map_err(fail)?;
        sync(&self.path)?;
        for name in MOVED {
            let from = self.path.join(name);
            if !from.exists() {
                continue;
            }
            if name == MANIFEST {
                sync(&self.target)?; // the files before the manifest that names them
            }
            fs::rename(from, self.target.join(name)).map_err(fail)?;
        }
        sync(&self.target)?;
        fs::remove_dir_all(&self.path).map_err(fail)?;
        sync(&self.target)
    }
}

/// Marks a partial directory whose files are being moved up.
const COMMITTING: &str = "committing";

impl Drop for Partial {
    fn drop(&mut self) {
        if self.whole {
            return;
        }
        if self.inside && self.path.join(COMMITTING).exists() {
            for name in MOVED {
                let _ = remove(&self.target.join(name));
            }
        }
        let _ = fs::remove_dir_all(&self.path);
        remove_empty(&self.made);
    }
}

fn remove_empty(directories: &[PathBuf]) {
    for directory in directories {
        // Another process may use it by now.
        let _ = fs::remove_dir(directory);
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes and locks the partial directory, which is empty unless it lies inside the target.
fn claim(path: &Path, target: &Path) -> Result<File> {
    let fail = |e| Error::io(path, e);
    loop {
        fs::create_dir_all(path).map_err(fail)?;
        let lock = match File::open(path) {
            // Its owner has just removed it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(fail)?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy {
                    path: target.into(),
                });
            }
            // A file system without locks.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        if !is_same(&lock, path) {
            continue; // the lock is that of a directory that was renamed or removed meanwhile
        }
        if path.file_name().is_some_and(|name| name != INSIDE) {
            for entry in fs::read_dir(path).map_err(fail)? {
                let left = entry.map_err(fail)?.path();
                remove(&left).map_err(|e| Error::io(left, e))?;
            }
        }
        return Ok(lock);
    }
}

#[cfg(unix)]
fn is_same(open: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let (open, named) = (open.metadata(), fs::metadata(path));
    open.is_ok_and(|a| named.is_ok_and(|b| (a.dev(), a.ino()) == (b.dev(), b.ino())))
}

#[cfg(not(unix))]
fn is_same(_: &File, path: &Path) -> bool {
    path.exists()
}

/// Waits until a directory is on the disk.
pub(super) fn sync(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|d| d.sync_all());
    match synced {
        // Some file systems cannot, and have nothing to lose then.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        other => other.map_err(|e| Error::io(directory, e)),
    }
}
