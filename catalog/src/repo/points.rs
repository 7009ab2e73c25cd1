//! Points: moments on every node to recover to.

use jiff::Timestamp;

use super::{Catalog, in_parallel, nearest, stem};
use crate::check;
use crate::envelope::OBJECT_LIMIT;
use crate::error::CatalogError;
use crate::ids::PointId;
use crate::keys;
use crate::model::{LogAction, Point};
use crate::put::Outcome;

/// Characters of an id that are its time.
const STAMP: usize = 16;

/// What a name below `points/` is.
#[derive(Debug)]
pub enum PointState {
    /// A point.
    Usable(Box<Point>),
    /// An object that cannot be used, and why.
    Unusable(CatalogError),
}

/// One name below `points/`.
#[derive(Debug)]
pub struct ListedPoint {
    /// The point's id as it stands in the bucket (of an unusable one perhaps no id at all).
    pub name: String,
    /// What it is.
    pub state: PointState,
}

impl Catalog {
    /// Writes a point and its log entry. The same point again (equal to the nonce) counts as written.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] if there is another of that id; [`CatalogError::Refused`] if it breaks a
    /// rule of the format; [`CatalogError::Store`]: the point may stand, and does no harm.
    pub async fn put_point(&self, point: &Point) -> Result<(), CatalogError> {
        let key = keys::point(&point.point_id);
        check::point(point, &point.point_id).map_err(|why| CatalogError::refused(&key, why))?;
        match self.create(&key, point, OBJECT_LIMIT).await? {
            (sealed, Outcome::Ours) => {
                let action = LogAction::PointCreated;
                let sha256 = &sealed.sha256;
                self.append_log(action, &key, sha256, point.operation)
                    .await?;
                Ok(())
            }
            (_, Outcome::Theirs(_)) => Err(CatalogError::conflict(&key, "another has this id")),
        }
    }

    /// Reads a point.
    ///
    /// # Errors
    /// [`CatalogError::NotFound`] with similar ids; [`CatalogError::NewerFormat`];
    /// [`CatalogError::Damaged`]; [`CatalogError::Store`].
    pub async fn point(&self, id: &PointId) -> Result<Point, CatalogError> {
        match self.read_point(id).await {
            Err(error) if error.is_absent() => Err(CatalogError::NotFound {
                what: "point",
                id: id.to_string(),
                nearest: nearest(id.as_str(), self.names(keys::POINTS).await?),
            }),
            result => result,
        }
    }

    async fn read_point(&self, id: &PointId) -> Result<Point, CatalogError> {
        let key = keys::point(id);
        let point: Point = self.read(&key).await?;
        check::point(&point, id).map_err(|why| CatalogError::damaged(&key, why))?;
        Ok(point)
    }

    /// The ids of all points, by time. None is read.
    ///
    /// # Errors
    /// [`CatalogError::Store`] if the store cannot list.
    pub async fn point_ids(&self) -> Result<Vec<PointId>, CatalogError> {
        let names = self.names(keys::POINTS).await?.into_iter();
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }

    /// Every point, by name and so by time; those that cannot be used are marked.
    ///
    /// # Errors
    /// [`CatalogError::Store`] if the store cannot list or hand out one of them.
    pub async fn points(&self) -> Result<Vec<ListedPoint>, CatalogError> {
        self.points_since(Timestamp::MIN).await
    }

    /// [`Self::points`], without those whose ids are of an earlier second than `since` (UTC).
    ///
    /// # Errors
    /// As [`Self::points`].
    pub async fn points_since(&self, since: Timestamp) -> Result<Vec<ListedPoint>, CatalogError> {
        let mut listed = self.list(keys::POINTS).await?;
        if since > Timestamp::UNIX_EPOCH {
            let first = PointId::generate(since);
            let stamp = format!("{}{}", keys::POINTS, &first.as_str()[..STAMP]);
            listed.retain(|object| object.key.as_str() >= stamp.as_str());
        }
        in_parallel(&listed, |object| async move {
            let name = object.key.as_str().strip_prefix(keys::POINTS);
            let name = name.unwrap_or_default().to_owned();
            let id = stem(&object.key, keys::POINTS).map(str::parse::<PointId>);
            let read = match id {
                Some(Ok(id)) => self.read_point(&id).await,
                Some(Err(error)) => Err(error.into()),
                None => Err(CatalogError::damaged(&object.key, "its key is no point's")),
            };
            let state = match read {
                Ok(point) => PointState::Usable(Box::new(point)),
                Err(error @ CatalogError::InvalidId(_)) => PointState::Unusable(error),
                Err(error) if error.is_of_object() => PointState::Unusable(error),
                Err(error) => return Err(error),
            };
            let name = stem(&object.key, keys::POINTS).map_or(name, str::to_owned);
            Ok(ListedPoint { name, state })
        })
        .await
    }
}
