//! Text files to noised batches: read, detokenize, tokenize, store, pack, order, gather.
//!
//! | module | contents |
//! | --- | --- |
//! | [`text`] | txt / jsonl / parquet readers in bounded memory, and detokenizers |
//! | [`tokenize`] | text to ids: the library's, words cached |
//! | [`prepare`] | files to a data set, in parallel and in order |
//! | [`store`] | `.bin`/`.idx` token files and their manifest |
//! | [`pack`] | rows of `seq_len` tokens as plans over documents |
//! | [`order`] | the order in which rows are seen |
//! | [`read_ahead`] | prefetch of rows that are not in memory yet |
//! | [`batch`] | gather and noise rows into the caller's buffers |

pub mod batch;
mod guard;
pub mod order;
pub mod pack;
pub mod prepare;
pub mod read_ahead;
pub mod store;
pub mod text;
pub mod tokenize;
