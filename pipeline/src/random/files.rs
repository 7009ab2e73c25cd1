//! Which bytes of which file lie in which frames: 16 bytes a file and 32 an extent.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::PipelineError;
use crate::extract::check_extents;
use crate::pack::{EntryKind, IndexEntry, PackInfo};
use crate::store::Key;

/// The files of one or several copies, collected before they are read.
#[derive(Debug, Default)]
pub struct RandomFiles {
    packs: Vec<(Key, PackInfo)>,
    rows: Vec<Row>,
    /// Of all files together, each file's in order.
    places: Vec<Placed>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    size: u64,
    /// Its first in `places`; the last is before the next row's first.
    first: u32,
}

#[derive(Debug, Clone, Copy)]
struct Placed {
    /// Where in the file it begins.
    at: u64,
    length: u64,
    pack: u32,
    first: u32,
    count: u32,
    offset: u32,
}

/// One file of a [`RandomFiles`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RandomFile(u32);

/// The packs of one copy, as [`RandomFiles::copy`] has taken them.
#[derive(Debug, Clone)]
pub struct CopyPacks {
    index: Key,
    /// Frames, by pack number.
    frames: Arc<BTreeMap<u32, u32>>,
    /// Places in `packs`, by pack number.
    places: Arc<BTreeMap<u32, u32>>,
}

/// Consecutive bytes of a file in consecutive frames of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pack: u32,
    pub(super) first: u32,
    pub(super) count: u32,
    /// Where it begins in the first frame.
    pub(super) offset: u32,
    /// Where it begins in the file.
    pub(super) at: u64,
    pub(super) length: u64,
    /// Whether the file has no other, and that is in one frame.
    pub(super) alone: bool,
}

impl RandomFiles {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the packs of a copy, whose index is `index`.
    ///
    /// # Errors
    /// [`PipelineError::Setup`] if two packs have the same number.
    pub fn copy(
        &mut self,
        index: &Key,
        packs: &[(Key, PackInfo)],
    ) -> Result<CopyPacks, PipelineError> {
        let (mut frames, mut places) = (BTreeMap::new(), BTreeMap::new());
        for (key, info) in packs {
            let place = narrow(self.packs.len(), "packs")?;
            if places.insert(info.number, place).is_some() {
                let what = format!("two packs of `{index}` have the same number");
                return Err(PipelineError::Setup(what));
            }
            frames.insert(info.number, info.frames);
            self.packs.push((key.clone(), info.clone()));
        }
        Ok(CopyPacks {
            index: index.clone(),
            frames: Arc::new(frames),
            places: Arc::new(places),
        })
    }

    /// Takes a file of that copy.
    ///
    /// # Errors
    /// [`PipelineError::Damaged`] if the entry names frames that do not exist; [`PipelineError::Setup`] if it is no file.
    pub fn file(
        &mut self,
        copy: &CopyPacks,
        entry: &IndexEntry,
    ) -> Result<RandomFile, PipelineError> {
        let EntryKind::File { size, extents } = &entry.kind else {
            let what = format!("`{}` is not a file", entry.path);
            return Err(PipelineError::Setup(what));
        };
        let damaged = |what: String| PipelineError::damaged(&copy.index, what);
        check_extents(entry, &copy.frames).map_err(damaged)?;
        let file = RandomFile(narrow(self.rows.len(), "files")?);
        let first = narrow(self.places.len(), "extents")?;
        let mut at = 0;
        for extent in extents {
            let pack = copy.places.get(&extent.pack).copied();
            self.places.push(Placed {
                at,
                length: extent.length,
                pack: pack.ok_or_else(|| damaged(format!("no pack {}", extent.pack)))?,
                first: extent.first,
                count: extent.count,
                offset: extent.offset,
            });
            at += extent.length;
        }
        self.rows.push(Row { size: at, first });
        if at != *size {
            let what = format!("`{}` has {size} bytes and {at} in its extents", entry.path);
            return Err(damaged(what));
        }
        Ok(file)
    }

    pub(super) fn shrink(&mut self) {
        self.rows.shrink_to_fit();
        self.places.shrink_to_fit();
    }

    pub(super) fn packs(&self) -> &[(Key, PackInfo)] {
        &self.packs
    }

    /// Frames of the pack that has most.
    pub(super) fn frames_most(&self) -> u32 {
        let frames = self.packs.iter().map(|(_, info)| info.frames);
        frames.max().unwrap_or(0)
    }

    pub(super) fn size(&self, file: RandomFile) -> u64 {
        self.rows.get(file.0 as usize).map_or(0, |row| row.size)
    }

    /// Where the byte at `offset` of a file lies; `None` beyond its end.
    pub(super) fn place(&self, file: RandomFile, offset: u64) -> Option<Place> {
        let row = self.rows.get(file.0 as usize)?;
        let next = self.rows.get(file.0 as usize + 1);
        let last = next.map_or(self.places.len(), |next| next.first as usize);
        let own = self.places.get(row.first as usize..last)?;
        let after = own.partition_point(|placed| placed.at <= offset);
        let placed = own.get(after.checked_sub(1)?)?;
        (offset < row.size).then_some(Place {
            pack: placed.pack,
            first: placed.first,
            count: placed.count,
            offset: placed.offset,
            at: placed.at,
            length: placed.length,
            alone: own.len() == 1 && placed.count == 1,
        })
    }
}

fn narrow(number: usize, what: &str) -> Result<u32, PipelineError> {
    u32::try_from(number).map_err(|_| PipelineError::Setup(format!("more than 2^32 {what}")))
}
