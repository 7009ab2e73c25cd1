//! Which data node a statement goes to: by its sharding column modulo the number of nodes.

use std::ops::Range;

use super::merge::Merge;
use super::node::Values;
use super::sql::{Piece, Token};
use super::statement::{Class, Statement};
use super::wire::Refusal;

/// A statement for one node.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Which storage unit, from 0.
    pub node: usize,
    pub sql: String,
    pub values: Option<Values>,
}

/// Where a statement goes.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub parts: Vec<Part>,
    pub merge: Merge,
}

/// The table that a statement is about; `None`: none of ours, such as `SELECT 1`.
pub(super) fn table(statement: &Statement) -> Option<String> {
    let pieces = &statement.pieces;
    let at = match statement.class {
        Class::Insert => find(pieces, 0, "into")? + 1,
        Class::Update => 1,
        Class::Select | Class::Delete => find(pieces, 0, "from")? + 1,
        Class::Ddl if pieces[0].is("truncate") => 1,
        Class::Ddl => {
            let index = pieces.iter().position(|piece| piece.is("index"));
            match index {
                Some(at) => at + 1 + find(&pieces[at + 1..], 0, "on")? + 1,
                None => pieces.iter().position(|piece| piece.is("table"))? + 1,
            }
        }
        _ => return None,
    };
    let rest = pieces.get(at..)?;
    let skip = |p: &&Piece| ["only", "table", "if", "not", "exists"].map(|w| p.is(w)) == [false; 5];
    let mut rest = rest.iter().filter(skip);
    let mut name = rest.next()?.name()?;
    let mut next = rest.next();
    if next.is_some_and(|piece| piece.is_symbol('.')) {
        if matches!(name, "pg_catalog" | "information_schema") {
            return None;
        }
        name = rest.next()?.name()?;
        next = rest.next();
    }
    let function = statement.class == Class::Select && next.is_some_and(|p| p.is_symbol('('));
    (!function && !name.starts_with("pg_")).then(|| name.to_owned())
}

/// Routes `statement` over `nodes` nodes; `column` is its table's sharding column.
pub(super) fn route(
    statement: &Statement,
    values: Option<&Values>,
    table: Option<&str>,
    column: &str,
    nodes: usize,
) -> Result<Route, Refusal> {
    let whole = |node| Part {
        node,
        sql: statement.sql.clone(),
        values: values.cloned(),
    };
    let to = |nodes: &[usize]| Route {
        parts: nodes.iter().copied().map(whole).collect(),
        merge: match nodes.len() {
            1 => Merge::default(),
            _ => Merge::of(statement),
        },
    };
    let everywhere: Vec<usize> = (0..nodes).collect();
    if nodes == 0 {
        return Err(Refusal::system("There is no storage unit in the database."));
    }
    match statement.class {
        Class::Insert => insert(statement, values, column, nodes),
        Class::Ddl => Ok(to(&everywhere)),
        Class::Select | Class::Update | Class::Delete if table.is_some() => {
            match keys(statement, values, column) {
                Some(keys) => Ok(to(&targets(&keys, nodes))),
                None => Ok(to(&everywhere)),
            }
        }
        Class::Other if !statement.pieces[0].is("explain") => Ok(to(&everywhere)),
        _ => Ok(to(&[0])),
    }
}

fn targets(keys: &[i64], nodes: usize) -> Vec<usize> {
    let nodes = i64::try_from(nodes).unwrap_or(i64::MAX);
    let mut targets: Vec<usize> = Vec::new();
    for key in keys {
        let target = usize::try_from(key.rem_euclid(nodes)).unwrap_or(0);
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    targets
}

/// Position of `word` outside all parentheses, from `from` on.
pub(super) fn find(pieces: &[Piece], from: usize, word: &str) -> Option<usize> {
    let mut depth = 0;
    pieces.iter().enumerate().skip(from).find_map(|(at, p)| {
        depth += i32::from(p.is_symbol('(')) - i32::from(p.is_symbol(')'));
        (depth == 0 && p.is(word)).then_some(at)
    })
}

/// The number that `pieces` begin with, and how many of them it takes.
fn key(pieces: &[Piece], values: Option<&Values>) -> Option<(i64, usize)> {
    let negative = usize::from(pieces.first()?.is_symbol('-'));
    let number = match &pieces.get(negative)?.token {
        Token::Number(number) => number.parse().ok()?,
        Token::Text(text) => text.trim().parse().ok()?,
        Token::Parameter(number) => parameter(values?, number.checked_sub(1)?)?,
        _ => return None,
    };
    let mut taken = negative + 1;
    // A cast: `::bigint`.
    while pieces.get(taken).is_some_and(|p| p.is_symbol(':')) {
        taken += 3;
    }
    let key: i64 = if negative == 1 { -number } else { number };
    Some((key, taken))
}

/// An integer parameter, in text or in binary.
fn parameter(values: &Values, index: usize) -> Option<i64> {
    let value = values.bind.values.get(index)?.as_deref()?;
    if !values.bind.is_binary(index) {
        return std::str::from_utf8(value).ok()?.trim().parse().ok();
    }
    match value.len() {
        2 => Some(i16::from_be_bytes(value.try_into().ok()?).into()),
        4 => Some(i32::from_be_bytes(value.try_into().ok()?).into()),
        8 => Some(i64::from_be_bytes(value.try_into().ok()?)),
        _ => None,
    }
}

/// The values that WHERE allows the sharding column, if it does limit them.
fn keys(statement: &Statement, values: Option<&Values>, column: &str) -> Option<Vec<i64>> {
    let pieces = &statement.pieces;
    let start = find(pieces, 0, "where")? + 1;
    if find(pieces, start, "or").is_some() {
        return None;
    }
    let mut depth = 0;
    for (at, piece) in pieces.iter().enumerate().skip(start) {
        depth += i32::from(piece.is_symbol('(')) - i32::from(piece.is_symbol(')'));
        if depth != 0 || piece.name() != Some(column) {
            continue;
        }
        let after = &pieces[at + 1..];
        if after.first().is_some_and(|p| p.is_symbol('=')) {
            let (key, taken) = key(&after[1..], values)?;
            let ends = after
                .get(1 + taken)
                .is_none_or(|p| !matches!(p.token, Token::Symbol(c) if c != ')'));
            return ends.then(|| vec![key]);
        }
        if after.first().is_some_and(|p| p.is("in")) {
            return listed(after.get(2..)?, values);
        }
    }
    None
}

/// The values up to the closing parenthesis.
fn listed(mut pieces: &[Piece], values: Option<&Values>) -> Option<Vec<i64>> {
    let mut keys = Vec::new();
    loop {
        let (key, taken) = key(pieces, values)?;
        keys.push(key);
        let next = pieces.get(taken)?;
        if next.is_symbol(')') {
            return Some(keys);
        }
        if !next.is_symbol(',') {
            return None;
        }
        pieces = &pieces[taken + 1..];
    }
}

/// Groups in parentheses from `at` on, as ranges of pieces, parentheses included.
fn groups(pieces: &[Piece], mut at: usize) -> Vec<Range<usize>> {
    let mut groups = Vec::new();
    while pieces.get(at).is_some_and(|p| p.is_symbol('(')) {
        let start = at;
        let mut depth = 0;
        while let Some(piece) = pieces.get(at) {
            depth += i32::from(piece.is_symbol('(')) - i32::from(piece.is_symbol(')'));
            at += 1;
            if depth == 0 {
                break;
            }
        }
        groups.push(start..at);
        if !pieces.get(at).is_some_and(|p| p.is_symbol(',')) {
            break;
        }
        at += 1;
    }
    groups
}

/// What stands between commas in a group.
fn items(group: &[Piece]) -> Vec<&[Piece]> {
    let inside = &group[1..group.len() - 1];
    let mut depth = 0;
    inside
        .split(|p| {
            depth += i32::from(p.is_symbol('(')) - i32::from(p.is_symbol(')'));
            depth == 0 && p.is_symbol(',')
        })
        .collect()
}

fn insert(
    statement: &Statement,
    values: Option<&Values>,
    column: &str,
    nodes: usize,
) -> Result<Route, Refusal> {
    let pieces = &statement.pieces;
    let unknown = || {
        let message = format!("Can not route an INSERT without a number for column `{column}`.");
        Refusal::new("0A000", message)
    };
    let at = find(pieces, 0, "values").ok_or_else(unknown)?;
    let into = find(pieces, 0, "into").ok_or_else(unknown)?;
    let list = (into..at).find(|at| pieces[*at].is_symbol('('));
    // Without a list of columns it is the first.
    let position = match list.and_then(|list| groups(pieces, list).into_iter().next()) {
        None => 0,
        Some(list) => items(&pieces[list])
            .iter()
            .position(|item| item.first().and_then(Piece::name) == Some(column))
            .ok_or_else(unknown)?,
    };
    let rows = groups(pieces, at + 1);
    if rows.is_empty() {
        return Err(unknown());
    }
    let mut by_node: Vec<Vec<Range<usize>>> = vec![Vec::new(); nodes];
    for row in &rows {
        let items = items(&pieces[row.clone()]);
        let item = items.get(position).ok_or_else(unknown)?;
        let (key, _) = key(item, values).ok_or_else(unknown)?;
        by_node[targets(&[key], nodes)[0]].push(row.clone());
    }
    let mut parts = Vec::new();
    for (node, mine) in by_node.iter().enumerate() {
        if mine.len() == rows.len() {
            parts.push(Part {
                node,
                sql: statement.sql.clone(),
                values: values.cloned(),
            });
        } else if !mine.is_empty() {
            parts.push(only(statement, values, &rows, mine, node));
        }
    }
    Ok(Route {
        parts,
        merge: Merge::default(),
    })
}

/// The statement with only some of its rows, and only the parameters that are left in it.
fn only(
    statement: &Statement,
    values: Option<&Values>,
    rows: &[Range<usize>],
    mine: &[Range<usize>],
    node: usize,
) -> Part {
    let pieces = &statement.pieces;
    let mut used: Vec<usize> = Vec::new();
    let mut text = |range: Range<usize>| {
        let mut out = String::new();
        let mut end = pieces.get(range.start).map_or(0, |piece| piece.at.start);
        for piece in &pieces[range] {
            out.push_str(&statement.sql[end..piece.at.start]);
            end = piece.at.end;
            let Token::Parameter(number) = piece.token else {
                out.push_str(&statement.sql[piece.at.clone()]);
                continue;
            };
            let place = used.iter().position(|used| *used == number);
            let place = place.unwrap_or_else(|| {
                used.push(number);
                used.len() - 1
            });
            out.push_str(&format!("${}", place + 1));
        }
        out
    };
    let (first, last) = (rows[0].start, rows[rows.len() - 1].end);
    let head = text(0..first);
    let middle: Vec<String> = mine.iter().cloned().map(&mut text).collect();
    let tail = text(last..pieces.len());
    Part {
        node,
        sql: format!("{head} {} {tail}", middle.join(", ")),
        values: values.map(|values| reduced(values, &used)),
    }
}

/// Only the parameters `used`, numbers from 1, in that order.
fn reduced(values: &Values, used: &[usize]) -> Values {
    let mut reduced = values.clone();
    let indices: Vec<usize> = used.iter().map(|number| number - 1).collect();
    let of = |index: &usize| values.types.get(*index).copied().unwrap_or(0);
    reduced.types = indices.iter().map(of).collect();
    let binary = |index: &usize| i16::from(values.bind.is_binary(*index));
    reduced.bind.formats = indices.iter().map(binary).collect();
    let value = |index: &usize| values.bind.values.get(*index).cloned().flatten();
    reduced.bind.values = indices.iter().map(value).collect();
    reduced
}

#[cfg(test)]
mod tests;
