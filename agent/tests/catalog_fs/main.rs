//! What the catalog as a file system promises, in-process: the same bytes, sizes and errors as a plain directory, within
//! its memory, whatever the store does. The very same scripts can run through a real mount, see `ops.rs`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::large_stack_arrays,
    clippy::format_push_string,
    clippy::cast_possible_truncation,
    clippy::duration_suboptimal_units,
    clippy::struct_excessive_bools,
    reason = "a panic is a failed test, with its reason"
)]

mod lower;
mod model;
mod ops;
mod pressure;
mod subject;
mod wal;
mod world;
mod zeros;

use pitr_agent::catalog_fs::Failure;
use proptest::prelude::*;
use world::{MIB, World, finish, run};

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sequence of calls gives what a plain directory gives, and what is stored is what a plain directory has.
    #[test]
    fn it_is_a_plain_directory_that_streams_away((steps, spoils) in ops::steps(80)) {
        let scratch = tempfile::tempdir().unwrap();
        let script = model::script(&steps, spoils, scratch.path());
        run(async {
            let world = World::new(160 * MIB);
            let mut subject = world.subject();
            #[expect(
                clippy::disallowed_methods,
                reason = "the script borrows, and the other workers answer it"
            )]
            let played = tokio::task::block_in_place(|| script.play(&mut subject));
            prop_assert_eq!(played, Ok(()));
            let finished = finish(&subject.fs).await;
            if script.spoiled {
                prop_assert!(matches!(finished, Err(Failure::Spoiled { .. })), "{:?}", finished);
                subject.fs.abort().await;
                return Ok(());
            }
            let (copy, wal) = finished.unwrap();
            let target = tempfile::tempdir().unwrap();
            let mut back = world.read_back(&copy, &wal, target.path()).await;
            // The mode of a segment that is not in packs is not kept.
            for segment in &wal {
                if let (Some(back), Some(due)) = (back.get_mut(&segment.path), script.tree.get(&segment.path)) {
                    back.0 = due.0;
                }
            }
            prop_assert_eq!(&back, &script.tree);
            Ok(())
        })?;
    }
}
