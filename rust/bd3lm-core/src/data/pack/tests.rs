use super::*;
use crate::data::store::{Recipe, StoreWriter, Verify, Vocab};
use proptest::prelude::*;

const VOCAB: Vocab = Vocab {
    vocab_size: 1 << 20,
    bos_id: 1,
    eos_id: 2,
    mask_id: 3,
};

/// Documents of the given lengths whose ids are 10, 11, 12, … over the whole set.
fn store(lengths: &[u64]) -> TokenStore {
    let total: u64 = lengths.iter().sum();
    TokenStore::from_arrays((10..10 + total as i32).collect(), lengths, VOCAB).unwrap()
}

struct Row {
    x0: Vec<i64>,
    noisable: Vec<u8>,
    doc_ids: Vec<i32>,
    padded: bool,
}

fn rows(store: &TokenStore, plan: &RowPlan, documents: bool) -> Vec<Row> {
    let l = plan.seq_len();
    (0..plan.num_rows())
        .map(|i| {
            // Poisoned, so that a position that is not written shows.
            let mut row = Row {
                x0: vec![-7; l],
                noisable: vec![7; l],
                doc_ids: vec![-7; l],
                padded: false,
            };
            let mut out = RowBuffers {
                x0: &mut row.x0,
                noisable: &mut row.noisable,
                doc_ids: &mut row.doc_ids,
            };
            row.padded = plan.gather(store, store.tokens(), i, documents, &mut out);
            row
        })
        .collect()
}

const WRAP: Packing = Packing::Wrap {
    row_eos: false,
    stride: None,
};

#[test]
fn wrap_concatenates_and_cuts() {
    let s = store(&[3, 4, 2]);
    let plan = RowPlan::new(&s, 4, 2, WRAP, true).unwrap();
    let r = rows(&s, &plan, true);
    assert_eq!(r[0].x0, [1, 10, 11, 12]);
    assert_eq!(r[1].x0, [1, 13, 14, 15]);
    assert_eq!(r[2].x0, [1, 16, 17, 18]);
    assert_eq!(r[0].doc_ids, [0, 0, 0, 0]);
    assert_eq!(r[2].doc_ids, [0, 0, 1, 1]);
    assert_eq!(r[1].noisable, [0, 1, 1, 1]);
    assert!(!r[2].padded);
}

#[test]
fn row_eos_closes_every_row() {
    let s = store(&[5]);
    let packing = Packing::Wrap {
        row_eos: true,
        stride: None,
    };
    let plan = RowPlan::new(&s, 4, 4, packing, false).unwrap();
    let r = rows(&s, &plan, false);
    assert_eq!(r.len(), 2, "the fifth token does not fill a row");
    assert_eq!(r[1].x0, [1, 12, 13, 2]);
    assert_eq!(r[1].noisable, [0, 1, 1, 1]);
}

#[test]
fn last_row_is_dropped_or_padded() {
    let s = store(&[5]);
    assert_eq!(RowPlan::new(&s, 4, 2, WRAP, false).unwrap().num_rows(), 1);
    let plan = RowPlan::new(&s, 4, 2, WRAP, true).unwrap();
    let r = rows(&s, &plan, false);
    assert_eq!(r[1].x0[..3], [1, 13, 14]);
    assert_eq!(r[1].doc_ids, [0, 0, 0, -1]);
    assert_eq!(r[1].noisable, [0, 1, 1, 0]);
    assert!(r[1].padded && !r[0].padded);
}

#[test]
fn strided_rows_score_every_token_once_with_context() {
    let s = store(&[21]);
    let packing = Packing::Wrap {
        row_eos: false,
        stride: Some(4),
    };
    let plan = RowPlan::new(&s, 8, 2, packing, true).unwrap();
    let mut scored = Vec::new();
    for (i, row) in rows(&s, &plan, false).iter().enumerate() {
        if i > 0 {
            assert_eq!(row.noisable[..4], [0; 4], "the first half is context");
        }
        let picked = row.x0.iter().zip(&row.noisable).filter(|(_, n)| **n == 1);
        scored.extend(picked.map(|(id, _)| *id));
    }
    assert_eq!(scored, (10..31).collect::<Vec<i64>>());
}

#[test]
fn aligned_documents_start_blocks() {
    let s = store(&[2, 6, 1]);
    let plan = RowPlan::new(&s, 8, 4, Packing::Aligned, false).unwrap();
    let r = rows(&s, &plan, true);
    assert_eq!(r[0].x0[..3], [1, 10, 11]);
    assert_eq!(r[0].x0[4..], [1, 12, 13, 14]);
    assert_eq!(r[0].doc_ids, [0, 0, 0, -1, 1, 1, 1, 1]);
    assert_eq!(r[0].noisable, [0, 1, 1, 0, 0, 1, 1, 1]);
    assert_eq!(r[1].x0[..4], [1, 15, 16, 17]);
    assert_eq!(r[1].x0[4..6], [1, 18]);
}

#[test]
fn best_fit_keeps_documents_whole() {
    let s = store(&[5, 3, 9, 1, 3]);
    let plan = RowPlan::new(&s, 8, 2, Packing::BestFit, false).unwrap();
    let r = rows(&s, &plan, true);
    // 9 tokens are cut into 7 + 2; the others stay whole.
    assert_eq!(r.len(), 4);
    assert_eq!(r[0].x0, [1, 18, 19, 20, 21, 22, 23, 24]);
    assert_eq!(r[1].x0, [1, 10, 11, 12, 13, 14, 1, 27]);
    let total: usize = r
        .iter()
        .flat_map(|x| &x.noisable)
        .map(|n| usize::from(*n))
        .sum();
    assert_eq!(total, 21);
}

#[test]
fn spans_are_what_a_row_is_made_of() {
    let s = store(&[3, 14, 2, 9, 1, 30]);
    let row_eos = Packing::Wrap {
        row_eos: true,
        stride: None,
    };
    let strided = Packing::Wrap {
        row_eos: false,
        stride: Some(4),
    };
    for packing in [WRAP, row_eos, strided, Packing::Aligned, Packing::BestFit] {
        let plan = RowPlan::new(&s, 16, 4, packing, true).unwrap();
        for (i, row) in rows(&s, &plan, false).iter().enumerate() {
            let mut named = Vec::new();
            // The id of token i is 10 + i; ids that a row adds are below that.
            plan.spans(&s, i, |span| named.extend(span.map(|at| 10 + at as i64)));
            let read: Vec<_> = row.x0.iter().copied().filter(|id| *id >= 10).collect();
            assert_eq!(named, read, "{packing:?}, row {i}");
        }
    }
}

#[test]
fn what_is_not_allowed_names_itself() {
    let s = store(&[5]);
    let message = |l, b, packing| {
        RowPlan::new(&s, l, b, packing, false)
            .unwrap_err()
            .to_string()
    };
    assert!(message(8, 3, WRAP).contains("block_size = 3: must be a divisor of seq_len = 8"));
    assert!(message(8, 0, WRAP).contains("block_size = 0"));
    assert!(message(1, 1, WRAP).contains("seq_len = 1"));
    assert!(message(64, 4, WRAP).contains("do not fill one row"));
    let stride = |stride| Packing::Wrap {
        row_eos: false,
        stride: Some(stride),
    };
    assert!(message(8, 4, stride(2)).contains("stride = 2: must be a multiple of 4 below 8"));
    assert!(message(8, 4, stride(8)).contains("stride = 8"));
}

proptest! {
    /// No plan loses a token, invents one, or scores one twice.
    #[test]
    fn every_token_stands_in_exactly_one_place(
        lengths in proptest::collection::vec(1u64..40, 1..30),
        blocks in 1usize..6,
        block_size in 1usize..6,
        which in 0usize..4,
    ) {
        let seq_len = blocks * block_size;
        prop_assume!(seq_len >= 2);
        let s = store(&lengths);
        let strided = block_size < seq_len;
        let packing = match which {
            0 => WRAP,
            1 => Packing::Aligned,
            2 => Packing::BestFit,
            _ => Packing::Wrap { row_eos: false, stride: strided.then_some(block_size) },
        };
        let plan = RowPlan::new(&s, seq_len, block_size, packing, true).unwrap();
        let mut seen = vec![0u32; s.tokens().len()];
        for row in rows(&s, &plan, true) {
            prop_assert_eq!(row.x0[0], 1);
            prop_assert_eq!(row.noisable[0], 0);
            for i in 0..seq_len {
                if row.noisable[i] == 1 {
                    prop_assert!(row.doc_ids[i] >= 0);
                    seen[row.x0[i] as usize - 10] += 1;
                }
                prop_assert!(row.noisable[i] <= 1 && row.doc_ids[i] >= -1 && row.x0[i] >= 1);
            }
            prop_assert_eq!(row.padded, row.doc_ids.contains(&-1));
        }
        prop_assert!(seen.iter().all(|n| *n == 1));
    }

    /// Aligned plans start every document on a block boundary behind a BOS, and a block never
    /// holds two documents.
    #[test]
    fn blocks_hold_one_document(
        lengths in proptest::collection::vec(1u64..40, 1..30),
        blocks in 1usize..6,
        block_size in 2usize..6,
        whole: bool,
    ) {
        let s = store(&lengths);
        let packing = if whole { Packing::BestFit } else { Packing::Aligned };
        let plan = RowPlan::new(&s, blocks * block_size, block_size, packing, true).unwrap();
        let mut whole_documents = 0;
        for row in rows(&s, &plan, true) {
            for (ids, docs) in row.x0.chunks(block_size).zip(row.doc_ids.chunks(block_size)) {
                let mut live: Vec<i32> = docs.iter().copied().filter(|d| *d >= 0).collect();
                live.dedup();
                prop_assert!(live.len() <= 1);
                if live.len() == 1 && docs[0] >= 0 && ids[0] == 1 {
                    whole_documents += 1;
                }
            }
        }
        if whole {
            let room = (blocks * block_size - 1) as u64;
            let pieces: u64 = lengths.iter().map(|n| n.div_ceil(room)).sum();
            prop_assert_eq!(whole_documents, pieces, "documents are cut only where a row is full");
        }
    }
}

/// Documents of ids 10, 11, … whose first tokens are prompts; each ends with an EOS (2).
fn store_with_prompts(documents: &[(usize, usize)]) -> TokenStore {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe {
        vocab: VOCAB,
        tokenizer: "{}".into(),
        detokenizer: None,
        no_eos: false,
    };
    let mut writer = StoreWriter::create(dir.path(), recipe).unwrap();
    let mut next = 10;
    for (prompt, response) in documents {
        let ids: Vec<u32> = (next..next + (prompt + response) as u32).collect();
        next += ids.len() as u32;
        if *prompt > 0 {
            writer.push_prompt(&ids[..*prompt]).unwrap();
        }
        writer.push(&ids[*prompt..], 1).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish(vec!["ids".into()], None).unwrap();
    TokenStore::open(dir.path(), Verify::Always).unwrap()
}

#[test]
fn prompts_are_clean_and_stay_with_their_responses() {
    let s = store_with_prompts(&[(3, 1), (0, 2)]);
    let plan = RowPlan::new(&s, 10, 2, Packing::BestFit, true).unwrap();
    assert_eq!(plan.num_stream_tokens(), 1 + 2 + 2);
    let r = rows(&s, &plan, true);
    assert_eq!(r[0].x0, [1, 10, 11, 12, 13, 2, 1, 14, 15, 2]);
    assert_eq!(r[0].noisable, [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]);
    assert_eq!(r[0].doc_ids, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
    for packing in [WRAP, Packing::Aligned] {
        let refused = RowPlan::new(&s, 10, 2, packing, true).unwrap_err();
        assert!(refused.to_string().contains("must be best_fit: this data"));
    }
}

#[test]
fn a_prompt_longer_than_a_row_loses_its_beginning() {
    // Rows hold 7 tokens behind BOS: of the prompt, those that the response and its EOS leave.
    let s = store_with_prompts(&[(20, 2)]);
    let plan = RowPlan::new(&s, 8, 4, Packing::BestFit, true).unwrap();
    let r = rows(&s, &plan, true);
    assert_eq!(r.len(), 1);
    assert_eq!(r[0].x0, [1, 26, 27, 28, 29, 30, 31, 2]);
    assert_eq!(r[0].noisable, [0, 0, 0, 0, 0, 1, 1, 1]);
    // A response longer than a row continues in the next.
    let s = store_with_prompts(&[(20, 9)]);
    let plan = RowPlan::new(&s, 8, 4, Packing::BestFit, true).unwrap();
    let r = rows(&s, &plan, true);
    assert_eq!(r[0].x0, [1, 30, 31, 32, 33, 34, 35, 36]);
    assert_eq!(r[1].x0, [1, 37, 38, 2, 1, 1, 1, 1]);
    let scored: usize = r
        .iter()
        .flat_map(|row| &row.noisable)
        .map(|n| *n as usize)
        .sum();
    assert_eq!(scored as u64, plan.num_stream_tokens());
}
