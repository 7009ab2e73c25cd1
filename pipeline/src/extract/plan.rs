//! From the index to what must be made, and which bytes of which frames go where.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use futures_util::StreamExt as _;

use super::Extracted;
use super::files::FilePlan;
use super::sync::Tree;
use crate::download::PackReader;
use crate::error::PipelineError;
use crate::index::Index;
use crate::pack::{EntryKind, Extent, IndexEntry, PackInfo};
use crate::store::Key;

/// A run of bytes of a file in one pack.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) file: u32,
    pub(super) file_offset: u64,
    pub(super) extent: Extent,
}

/// Bytes of a file in one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) frame: u32,
    pub(crate) file: u32,
    /// Where in the frame's plain bytes.
    pub(crate) offset: u32,
    pub(crate) length: u32,
    pub(crate) file_offset: u64,
}

impl Slice {
    /// Its bytes of a frame's plain ones. Nothing is out of range: that was checked against the table.
    pub(crate) fn of<'a>(&self, plain: &'a [u8]) -> &'a [u8] {
        let start = self.offset as usize;
        plain
            .get(start..start + self.length as usize)
            .unwrap_or_default()
    }
}

/// What an extent means, frame by frame.
///
/// # Errors
/// [`PipelineError::Damaged`] if it names frames that do not exist, or does not end in its last one.
pub(crate) fn slices_of(
    pack: &PackReader,
    path: &str,
    file: u32,
    mut file_offset: u64,
    extent: &Extent,
) -> Result<Vec<Slice>, PipelineError> {
    let wrong =
        |what: &str| pack.damaged(format!("the index's extent {extent:?} of `{path}` {what}"));
    let end = extent.first.checked_add(extent.count);
    let end = end.filter(|end| *end as usize <= pack.table().len());
    let end = end.ok_or_else(|| wrong("names frames that do not exist"))?;
    let mut slices = Vec::with_capacity(extent.count as usize);
    let (mut rest, mut offset) = (extent.length, extent.offset);
    for frame in extent.first..end {
        let plain_len = pack.table().stamp(frame).map_or(0, |stamp| stamp.plain_len);
        let held = plain_len
            .checked_sub(offset)
            .filter(|held| *held > 0 && rest > 0);
        let held = held.ok_or_else(|| wrong("does not fit its frames"))?;
        let length = u32::try_from(rest).unwrap_or(u32::MAX).min(held);
        slices.push(Slice {
            frame,
            file,
            offset,
            length,
            file_offset,
        });
        rest -= u64::from(length);
        file_offset += u64::from(length);
        offset = 0;
    }
    if rest > 0 {
        return Err(wrong("is longer than its frames"));
    }
    Ok(slices)
}

/// All that is to be done.
pub(super) struct Plan {
    pub(super) tree: Tree,
    pub(super) files: Vec<FilePlan>,
    /// By pack number.
    pub(super) pieces: BTreeMap<u32, Vec<Piece>>,
    pub(super) extracted: Extracted,
}

impl Plan {
    /// Reads the whole index, and with that verifies it, before anything is made.
    pub(super) async fn read(
        index: &Index,
        packs: &[(Key, PackInfo)],
        mut map: impl FnMut(&IndexEntry) -> Result<Option<PathBuf>, PipelineError>,
    ) -> Result<Self, PipelineError> {
        let frames: BTreeMap<u32, u32> = packs
            .iter()
            .map(|(_, info)| (info.number, info.frames))
            .collect();
        if frames.len() != packs.len() {
            let what = "two packs have the same number";
            return Err(PipelineError::Setup(what.into()));
        }
        let mut plan = Self {
            tree: Tree::default(),
            files: Vec::new(),
            pieces: BTreeMap::new(),
            extracted: Extracted::default(),
        };
        let mut entries = index.entries();
        while let Some(entry) = entries.next().await {
            let entry = entry?;
            check_extents(&entry, &frames)
                .map_err(|what| PipelineError::damaged(index.key(), what))?;
            if let Some(target) = map(&entry)? {
                plan.add(entry, target)?;
            }
        }
        plan.refuse_links_on_the_way(index.key())?;
        Ok(plan)
    }

    fn add(&mut self, entry: IndexEntry, target: PathBuf) -> Result<(), PipelineError> {
        match entry.kind {
            EntryKind::Directory => {
                self.extracted.directories += 1;
                self.tree.directory(target, entry.mode, entry.mtime);
            }
            EntryKind::Symlink { target: to } => {
                self.extracted.links += 1;
                self.tree.link(target, to);
            }
            EntryKind::File { size, extents } => {
                self.extracted.files += 1;
                self.extracted.plain_bytes += size;
                let file = u32::try_from(self.files.len())
                    .map_err(|_| PipelineError::Setup("more than 2^32 files".into()))?;
                let mut file_offset = 0;
                for extent in extents {
                    self.pieces.entry(extent.pack).or_default().push(Piece {
                        file,
                        file_offset,
                        extent,
                    });
                    file_offset += extent.length;
                }
                self.tree.parent_of(&target);
                if size == 0 {
                    self.tree.empty_file(target, entry.mode, entry.mtime);
                } else {
                    self.files
                        .push(FilePlan::new(target, size, entry.mode, entry.mtime));
                }
            }
        }
        Ok(())
    }

    /// A file below a link that is made from the same index would be written wherever the link points.
    fn refuse_links_on_the_way(&self, index: &Key) -> Result<(), PipelineError> {
        let links: HashSet<&Path> = self.tree.links().collect();
        if links.is_empty() {
            return Ok(());
        }
        let files = self.files.iter().map(|file| file.path.as_path());
        for path in files.chain(self.tree.paths()) {
            if let Some(link) = path.ancestors().skip(1).find(|path| links.contains(path)) {
                let what = format!(
                    "`{}` lies below the link `{}`",
                    path.display(),
                    link.display()
                );
                return Err(PipelineError::damaged(index, what));
            }
        }
        Ok(())
    }
}

/// Checks that an entry names only frames that the manifest's packs have; `frames`: how many, by pack number.
///
/// # Errors
/// What is wrong.
pub(crate) fn check_extents(entry: &IndexEntry, frames: &BTreeMap<u32, u32>) -> Result<(), String> {
    let EntryKind::File { extents, .. } = &entry.kind else {
        return Ok(());
    };
    for extent in extents {
        let path = &entry.path;
        let Some(frames) = frames.get(&extent.pack) else {
            return Err(format!(
                "`{path}` names pack {}, which does not exist",
                extent.pack
            ));
        };
        let end = extent.first.checked_add(extent.count);
        if end.is_none_or(|end| end > *frames) {
            return Err(format!(
                "`{path}` names frames that do not exist: {extent:?}"
            ));
        }
    }
    Ok(())
}
