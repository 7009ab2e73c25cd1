//! One answer out of those of several nodes.

use std::cmp::Ordering;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::node::Answer;
use super::route::find;
use super::sql::{Piece, Token};
use super::statement::{Class, Statement};
use super::wire::{self, Body, Refusal};

const INT8: u32 = 20;
const INT2: u32 = 21;
const INT4: u32 = 23;
const NUMERIC: u32 = 1700;

/// How the rows of several nodes become those of one answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Merge {
    /// One row of these, made of one of each node.
    pub aggregates: Vec<Aggregate>,
    order: Vec<Order>,
    limit: Option<usize>,
}

/// What is done with a column of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aggregate {
    Add,
    Least,
    Greatest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Order {
    column: Column,
    descending: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Column {
    Named(String),
    Number(usize),
    /// An expression.
    Other,
}

impl Merge {
    /// As `statement` asks.
    pub(super) fn of(statement: &Statement) -> Self {
        let pieces = &statement.pieces;
        if statement.class != Class::Select {
            return Self::default();
        }
        let from = find(pieces, 0, "from").unwrap_or(pieces.len());
        let grouped = find(pieces, from, "group").is_some();
        let limit = find(pieces, from, "limit").and_then(|at| match &pieces.get(at + 1)?.token {
            Token::Number(number) => number.parse().ok(),
            _ => None,
        });
        Self {
            aggregates: if grouped {
                Vec::new()
            } else {
                aggregates(&pieces[1..from]).unwrap_or_default()
            },
            order: order(pieces, from),
            limit,
        }
    }

    /// Whether the nodes are to be asked for text, whatever the client wants.
    pub(super) fn wants_text(&self) -> bool {
        !self.aggregates.is_empty()
    }

    /// Merges. `formats` are those that the client wants.
    pub(super) fn apply(
        &self,
        mut answers: Vec<Answer>,
        formats: &[i16],
    ) -> Result<Answer, Refusal> {
        if answers.len() < 2 {
            return Ok(answers.pop().unwrap_or_default());
        }
        let tag = tag(&answers);
        let mut columns = answers[0].columns.clone();
        let mut rows: Vec<Bytes> = Vec::new();
        for answer in &mut answers {
            rows.append(&mut answer.rows);
        }
        let described = columns.clone().map(described).transpose();
        let described = described.map_err(|e| Refusal::system(e.to_string()))?;
        let described = described.unwrap_or_default();
        if !self.aggregates.is_empty() {
            rows = vec![self.aggregate(&rows, &described, formats)?];
            columns = columns.map(|columns| reformatted(&columns, formats));
        }
        self.sort(&mut rows, &described, formats)?;
        rows.truncate(self.limit.unwrap_or(usize::MAX));
        let tag = if tag.starts_with("SELECT") {
            format!("SELECT {}", rows.len())
        } else {
            tag
        };
        Ok(Answer {
            parameters: None,
            columns,
            rows,
            tag,
        })
    }

    fn aggregate(
        &self,
        rows: &[Bytes],
        described: &[Described],
        formats: &[i16],
    ) -> Result<Bytes, Refusal> {
        let mut sums: Vec<Option<i128>> = vec![None; self.aggregates.len()];
        for row in rows {
            for ((value, sum), how) in values(row).iter().zip(&mut sums).zip(&self.aggregates) {
                let Some(value) = value else { continue };
                let text = String::from_utf8_lossy(value);
                let number: i128 = text.parse().map_err(|_| {
                    Refusal::new("0A000", format!("Can not merge `{text}` of several nodes."))
                })?;
                *sum = Some(match (*sum, how) {
                    (None, _) => number,
                    (Some(sum), Aggregate::Add) => sum + number,
                    (Some(sum), Aggregate::Least) => sum.min(number),
                    (Some(sum), Aggregate::Greatest) => sum.max(number),
                });
            }
        }
        let encoded: Vec<Option<Vec<u8>>> = sums
            .iter()
            .enumerate()
            .map(|(index, sum)| {
                let kind = described.get(index).map_or(0, |column| column.kind);
                let binary = wire::is_binary(formats, index);
                sum.map(|sum| encoded(sum, kind, binary)).transpose()
            })
            .collect::<Result<_, _>>()?;
        Ok(wire::row(&encoded))
    }

    fn sort(
        &self,
        rows: &mut [Bytes],
        described: &[Described],
        formats: &[i16],
    ) -> Result<(), Refusal> {
        let mut by: Vec<(usize, bool)> = Vec::new();
        for order in &self.order {
            let index = match &order.column {
                Column::Number(number) => number.checked_sub(1),
                Column::Named(name) => described.iter().position(|c| c.name == *name),
                Column::Other => None,
            };
            let index = index.ok_or_else(|| {
                let message = "The stand-in puts rows in order only by columns that it returns.";
                Refusal::new("0A000", message)
            })?;
            by.push((index, order.descending));
        }
        rows.sort_by(|a, b| {
            let (a, b) = (values(a), values(b));
            by.iter().fold(Ordering::Equal, |so_far, (index, down)| {
                let kind = described.get(*index).map_or(0, |column| column.kind);
                let binary = wire::is_binary(formats, *index);
                let pick = |row: &[Option<Bytes>]| {
                    let value = row.get(*index).cloned().flatten();
                    value.map(|value| comparable(&value, kind, binary))
                };
                // NULL comes last.
                let (a, b) = (pick(&a), pick(&b));
                let order = (a.is_none(), a).cmp(&(b.is_none(), b));
                so_far.then(if *down { order.reverse() } else { order })
            })
        });
        Ok(())
    }
}

/// A number before any text.
fn comparable(value: &[u8], kind: u32, binary: bool) -> (i128, Vec<u8>) {
    let number = match (binary, kind, value.len()) {
        (true, INT2, 2) => value.try_into().ok().map(|v| i16::from_be_bytes(v).into()),
        (true, INT4, 4) => value.try_into().ok().map(|v| i32::from_be_bytes(v).into()),
        (true, INT8, 8) => value.try_into().ok().map(|v| i64::from_be_bytes(v).into()),
        (true, ..) => None,
        (false, ..) => std::str::from_utf8(value).ok().and_then(|t| t.parse().ok()),
    };
    match number {
        Some(number) => (number, Vec::new()),
        None => (i128::MAX, value.to_vec()),
    }
}

fn encoded(sum: i128, kind: u32, binary: bool) -> Result<Vec<u8>, Refusal> {
    let range = |_| Refusal::new("22003", "out of range");
    Ok(match (binary, kind) {
        (false, _) => sum.to_string().into_bytes(),
        (true, INT8) => i64::try_from(sum).map_err(range)?.to_be_bytes().to_vec(),
        (true, INT4) => i32::try_from(sum).map_err(range)?.to_be_bytes().to_vec(),
        (true, INT2) => i16::try_from(sum).map_err(range)?.to_be_bytes().to_vec(),
        (true, NUMERIC) => numeric(sum),
        (true, kind) => {
            let message = format!("Can not merge binary values of type {kind}.");
            return Err(Refusal::new("0A000", message));
        }
    })
}

/// A whole `numeric` in binary: digits to the base of 10000.
fn numeric(value: i128) -> Vec<u8> {
    let mut rest = value.unsigned_abs();
    let mut digits: Vec<u16> = Vec::new();
    while rest > 0 {
        digits.insert(0, u16::try_from(rest % 10_000).unwrap_or(0));
        rest /= 10_000;
    }
    let count = u16::try_from(digits.len()).unwrap_or(0);
    let sign: u16 = if value < 0 { 0x4000 } else { 0 };
    let head = [count, count.saturating_sub(1), sign, 0];
    head.into_iter()
        .chain(digits)
        .flat_map(u16::to_be_bytes)
        .collect()
}

fn values(row: &Bytes) -> Vec<Option<Bytes>> {
    Body(row.clone()).values().unwrap_or_default()
}

/// A column of an answer.
struct Described {
    name: String,
    kind: u32,
}

fn described(columns: Bytes) -> std::io::Result<Vec<Described>> {
    let mut body = Body(columns);
    let mut described = Vec::new();
    for _ in 0..body.short()? {
        let name = body.text()?;
        let _table = (body.int()?, body.short()?);
        let kind = u32::from_be_bytes(body.int()?.to_be_bytes());
        let _rest = (body.short()?, body.int()?, body.short()?);
        described.push(Described { name, kind });
    }
    Ok(described)
}

/// The same columns with other formats.
fn reformatted(columns: &Bytes, formats: &[i16]) -> Bytes {
    let mut out = BytesMut::from(&columns[..2]);
    let mut rest = &columns[2..];
    let mut index = 0;
    while let Some(end) = rest.iter().position(|byte| *byte == 0) {
        let Some((column, others)) = rest.split_at_checked(end + 17) else {
            break;
        };
        let Some(others) = others.get(2..) else { break };
        out.put_slice(column);
        out.put_i16(wire::is_binary(formats, index).into());
        (rest, index) = (others, index + 1);
    }
    out.freeze()
}

/// `UPDATE 1` and `UPDATE 2` are `UPDATE 3`; what has no number stays.
fn tag(answers: &[Answer]) -> String {
    let first = &answers[0].tag;
    let Some((words, _)) = first.rsplit_once(' ') else {
        return first.clone();
    };
    let counts: Option<Vec<u64>> = answers
        .iter()
        .map(|answer| answer.tag.rsplit(' ').next()?.parse().ok())
        .collect();
    counts.map_or_else(
        || first.clone(),
        |counts| format!("{words} {}", counts.iter().sum::<u64>()),
    )
}

/// `None`: there is something else in the list of columns.
fn aggregates(pieces: &[Piece]) -> Option<Vec<Aggregate>> {
    let mut depth = 0;
    let items = pieces.split(|p| {
        depth += i32::from(p.is_symbol('(')) - i32::from(p.is_symbol(')'));
        depth == 0 && p.is_symbol(',')
    });
    items
        .map(|item| {
            let word = item
                .iter()
                .find(|p| !(p.is("coalesce") || p.is_symbol('(')))?;
            match word.name()? {
                "count" | "sum" => Some(Aggregate::Add),
                "min" => Some(Aggregate::Least),
                "max" => Some(Aggregate::Greatest),
                _ => None,
            }
        })
        .collect()
}

/// What may follow a column in ORDER BY.
const AFTER: [&str; 7] = ["asc", "desc", "limit", "offset", "for", "fetch", "nulls"];

fn order(pieces: &[Piece], from: usize) -> Vec<Order> {
    let Some(at) = find(pieces, from, "order") else {
        return Vec::new();
    };
    let mut rest = pieces.get(at + 2..).unwrap_or_default();
    let mut order = Vec::new();
    loop {
        if rest.get(1).is_some_and(|piece| piece.is_symbol('.')) {
            rest = &rest[2..];
        }
        let column = match rest.first().map(|piece| &piece.token) {
            Some(Token::Number(number)) => number.parse().map_or(Column::Other, Column::Number),
            Some(Token::Word(name) | Token::Quoted(name)) => Column::Named(name.clone()),
            _ => Column::Other,
        };
        let simple = match rest.get(1).map(|piece| &piece.token) {
            None | Some(Token::Symbol(',')) => true,
            Some(Token::Word(word)) => AFTER.contains(&word.as_str()),
            _ => false,
        };
        let column = if simple { column } else { Column::Other };
        let descending = rest.get(1).is_some_and(|piece| piece.is("desc"));
        order.push(Order { column, descending });
        let stated = descending || rest.get(1).is_some_and(|piece| piece.is("asc"));
        let next = 1 + usize::from(stated);
        if !rest.get(next).is_some_and(|piece| piece.is_symbol(',')) {
            break;
        }
        rest = &rest[next + 1..];
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(rows: &[&[&str]], tag: &str) -> Answer {
        let rows = rows.iter().map(|row| {
            let values: Vec<_> = row.iter().map(Some).collect();
            wire::row(&values)
        });
        Answer {
            parameters: None,
            columns: Some(wire::columns(&["id", "balance"])),
            rows: rows.collect(),
            tag: tag.to_owned(),
        }
    }

    fn merged(sql: &str, answers: Vec<Answer>) -> (Vec<Vec<String>>, String) {
        let statement = Statement::parse(sql).unwrap();
        let merged = Merge::of(&statement).apply(answers, &[]).unwrap();
        let text = |value: &Option<Bytes>| {
            let value = value.clone().unwrap_or_default();
            String::from_utf8(value.to_vec()).unwrap()
        };
        let rows = merged.rows.iter().map(values);
        let rows = rows.map(|row| row.iter().map(text).collect()).collect();
        (rows, merged.tag)
    }

    #[test]
    fn sums_and_counts_are_added() {
        let (rows, tag) = merged(
            "SELECT count(*), coalesce(sum(balance), 0)::bigint FROM account",
            vec![
                answer(&[&["2", "150"]], "SELECT 1"),
                answer(&[&["3", "-50"]], "SELECT 1"),
            ],
        );
        assert_eq!(rows, [["5", "100"]]);
        assert_eq!(tag, "SELECT 1");
    }

    #[test]
    fn rows_are_put_in_order_and_cut() {
        let answers = || {
            vec![
                answer(&[&["2", "b"], &["10", "a"]], "SELECT 2"),
                answer(&[&["1", "a"], &["3", "c"]], "SELECT 2"),
            ]
        };
        let ids = |sql| {
            let (rows, tag) = merged(sql, answers());
            let ids: Vec<_> = rows.into_iter().map(|row| row[0].clone()).collect();
            (ids.join(" "), tag)
        };
        let (ordered, tag) = ids("SELECT id, balance FROM account ORDER BY id");
        assert_eq!((ordered.as_str(), tag.as_str()), ("1 2 3 10", "SELECT 4"));
        let (ordered, tag) = ids("SELECT id, balance FROM account a ORDER BY 2 DESC, a.id LIMIT 3");
        assert_eq!((ordered.as_str(), tag.as_str()), ("3 2 1", "SELECT 3"));
        for sql in ["ORDER BY other", "ORDER BY id + 1", "ORDER BY f(id)"] {
            let statement = Statement::parse(&format!("SELECT id, balance FROM account {sql}"));
            let merge = Merge::of(&statement.unwrap());
            assert_eq!(
                merge.apply(answers(), &[]).unwrap_err().state,
                "0A000",
                "{sql}"
            );
        }
        let (unordered, _) = ids("SELECT id, balance FROM account");
        assert_eq!(unordered, "2 10 1 3");
    }

    #[test]
    fn tags_of_changes_are_added() {
        let answers = ["UPDATE 2", "UPDATE 3"].map(|tag| Answer {
            tag: tag.to_owned(),
            ..Answer::default()
        });
        assert_eq!(
            merged("UPDATE account SET a = 1", answers.to_vec()).1,
            "UPDATE 5"
        );
        let answers = vec![answer(&[], "CREATE TABLE"), answer(&[], "CREATE TABLE")];
        assert_eq!(merged("CREATE TABLE t (id int)", answers).1, "CREATE TABLE");
    }

    #[test]
    fn numbers_in_binary() {
        assert_eq!(encoded(-1, INT8, true).unwrap(), [0xff; 8]);
        // 12345678 is the digits 1234 and 5678.
        let expected = [0, 2, 0, 1, 0, 0, 0, 0, 0x04, 0xd2, 0x16, 0x2e];
        assert_eq!(numeric(12_345_678), expected);
        assert_eq!(numeric(0), [0; 8]);
        assert!(encoded(1 << 70, INT8, true).is_err());
    }
}
