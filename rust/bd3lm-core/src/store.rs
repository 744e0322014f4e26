//! Token files: `.bin`/`.idx` in the Megatron IndexedDataset v1 layout, and `manifest.json`.

/// A borrowed flat array of token ids, in the width the file holds.
#[derive(Clone, Copy, Debug)]
pub enum Tokens<'a> {
    /// Every id fits 16 bits.
    U16(&'a [u16]),
    /// The wide form.
    I32(&'a [i32]),
}
