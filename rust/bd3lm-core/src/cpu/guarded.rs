//! Test buffers between inaccessible pages.

use std::ffi::c_void;

/// Bytes that end right before, or begin right after, an inaccessible page.
pub(crate) struct Guarded {
    map: *mut c_void,
    map_len: usize,
    start: *mut u8,
    len: usize,
}

const PAGE: usize = 4096;

impl Guarded {
    pub fn new(bytes: &[u8], at_end: bool) -> Guarded {
        let inner = bytes.len().next_multiple_of(PAGE);
        let map_len = inner + 2 * PAGE;
        // SAFETY: a new anonymous mapping; only its inner pages become accessible, and the
        // bytes are written there.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), map_len, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let first = map.cast::<u8>().add(PAGE);
            if inner > 0 {
                let access = libc::PROT_READ | libc::PROT_WRITE;
                assert_eq!(libc::mprotect(first.cast(), inner, access), 0);
            }
            let start = if at_end {
                first.add(inner - bytes.len())
            } else {
                first
            };
            start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            Guarded {
                map,
                map_len,
                start,
                len: bytes.len(),
            }
        }
    }

    pub fn ptr(&self) -> *mut u8 {
        self.start
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` accessible bytes begin there.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    pub fn i32s(&self) -> &[i32] {
        // SAFETY: as above; made from whole int32, and page ends are aligned.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.len / 4) }
    }

    pub fn f32s(&mut self) -> &mut [f32] {
        // SAFETY: as above; whole float32.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / 4) }
    }

    pub fn i16s(&mut self) -> &mut [i16] {
        // SAFETY: as above; whole int16.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.len / 2) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `new`.
        unsafe { libc::munmap(self.map, self.map_len) };
    }
}
