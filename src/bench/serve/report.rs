//! What was seen, in rows and tables.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Pace;
use super::hand_off::{Found, HandOff};
use super::load::Seen;
use crate::bench::report::{Figure, Unit};
use crate::bench::stats::{Curve, Samples, Spread};
use crate::bench::table::Table;

fn spread_of_times(times: impl Iterator<Item = Duration>) -> Option<Spread> {
    times.map(|time| time.as_secs_f64() * 1000.0).collect::<Samples>().spread()
}

/// The hand-off's part of a row, as decode's runtime recorded it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HandOffs {
    /// Transfers with a record. Those without were served by one worker alone, or their record is gone.
    pub transfers: usize,
    /// How many went by which path.
    pub paths: BTreeMap<String, usize>,
    /// How many were dispatched how. Of concurrent ones, only what came after prefill's end is counted.
    pub dispatches: BTreeMap<String, usize>,
    pub bytes_mean: f64,
    pub wait_ms: Spread,
    pub copy_ms: Spread,
    pub validate_ms: Spread,
    /// All three together, as a part of the time to the first token (0 to 1).
    pub share_of_ttft: Spread,
    /// The one whose time to the first token is in the middle of all.
    pub middle: Timeline,
}

/// One request up to its first token, in milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Timeline {
    pub path: String,
    pub dispatch: String,
    pub bytes: u64,
    pub ttft_ms: f64,
    pub wait_ms: f64,
    pub copy_ms: f64,
    pub validate_ms: f64,
}

impl Timeline {
    fn middle_of(hand_offs: &[HandOff]) -> Option<Self> {
        let mut sorted: Vec<&HandOff> = hand_offs.iter().collect();
        sorted.sort_by_key(|hand_off| hand_off.first);
        let middle = *sorted.get(sorted.len() / 2)?;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Some(Self {
            path: middle.path.to_owned(),
            dispatch: middle.dispatch.name().to_owned(),
            bytes: middle.bytes,
            ttft_ms: ms(middle.first),
            wait_ms: ms(middle.wait),
            copy_ms: ms(middle.copy),
            validate_ms: ms(middle.validate),
        })
    }
}

impl HandOffs {
    fn of(hand_offs: &[HandOff]) -> Option<Self> {
        let times = |part: fn(&HandOff) -> Duration| spread_of_times(hand_offs.iter().map(part));
        let (mut paths, mut dispatches) = (BTreeMap::new(), BTreeMap::new());
        for hand_off in hand_offs {
            *dispatches.entry(hand_off.dispatch.name().to_owned()).or_insert(0) += 1;
            *paths.entry(hand_off.path.to_owned()).or_insert(0) += 1;
        }
        Some(Self {
            transfers: hand_offs.len(),
            paths,
            dispatches,
            bytes_mean: hand_offs.iter().map(|hand_off| hand_off.bytes as f64).sum::<f64>() / hand_offs.len() as f64,
            wait_ms: times(|hand_off| hand_off.wait)?,
            copy_ms: times(|hand_off| hand_off.copy)?,
            validate_ms: times(|hand_off| hand_off.validate)?,
            middle: Timeline::middle_of(hand_offs)?,
            share_of_ttft: hand_offs.iter().map(|hand_off| hand_off.share).collect::<Samples>().spread()?,
        })
    }
}

/// One prompt length at one load, at one of the two servers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub server: String,
    pub prompt_tokens: usize,
    /// As the server counted them, on average; differs from what was asked for where prompts are text.
    pub prompt_tokens_seen: Option<f64>,
    pub output_tokens: u32,
    pub load: String,
    /// Answered in full.
    pub requests: usize,
    pub errors: usize,
    /// The first few errors, in words.
    pub error_examples: Vec<String>,
    pub seconds: f64,
    pub ttft_ms: Option<Spread>,
    /// How it is distributed.
    pub ttft_curve: Option<Curve>,
    /// Between tokens.
    pub itl_ms: Option<Spread>,
    /// Of all answers together.
    pub tokens_per_second: f64,
    /// What the proxy waited for prefill's answer, on average over the row, where it tells.
    pub prefill_leg_ms_mean: Option<f64>,
    pub hand_off: Option<HandOffs>,
    /// Transfers that answers named and whose record could not be read; and why, for one.
    pub hand_offs_missed: usize,
    pub hand_offs_missed_example: Option<String>,
}

impl Row {
    pub(super) fn new(
        server: &'static str,
        prompt_tokens: usize,
        output_tokens: u32,
        pace: Pace,
        seen: &Seen,
        found: &Found,
        prefill_leg_ms_mean: Option<f64>,
    ) -> Self {
        let answers = &seen.answers;
        let seconds = seen.took.as_secs_f64();
        let tokens: f64 = answers.iter().map(|answer| f64::from(answer.tokens)).sum();
        let counted: Vec<f64> = answers.iter().filter_map(|answer| answer.prompt_tokens.map(f64::from)).collect();
        Self {
            server: server.to_owned(),
            prompt_tokens,
            prompt_tokens_seen: (!counted.is_empty()).then(|| counted.iter().sum::<f64>() / counted.len() as f64),
            output_tokens,
            load: pace.to_string(),
            requests: answers.len(),
            errors: seen.errors,
            error_examples: seen.told.clone(),
            seconds,
            ttft_curve: answers.iter().map(|answer| answer.first.as_secs_f64() * 1000.0).collect::<Samples>().curve(),
            ttft_ms: spread_of_times(answers.iter().map(|answer| answer.first)),
            itl_ms: spread_of_times(answers.iter().flat_map(|answer| answer.gaps.iter().copied())),
            tokens_per_second: if seconds > 0.0 { tokens / seconds } else { 0.0 },
            prefill_leg_ms_mean,
            hand_off: HandOffs::of(&found.hand_offs),
            hand_offs_missed: found.missed,
            hand_offs_missed_example: found.told.clone(),
        }
    }

    /// One line for a person who waits for the table.
    pub(super) fn in_words(&self) -> String {
        let errors = match (self.errors, self.error_examples.first()) {
            (0, _) | (_, None) => String::new(),
            (errors, Some(first)) => format!(", {errors} error(s), the first: {first}"),
        };
        let ttft = self.ttft_ms.map_or_else(|| "-".to_owned(), |ttft| format!("{:.1} ms", ttft.median));
        let Self { server, prompt_tokens, load, requests, seconds, .. } = self;
        format!("{server}, {prompt_tokens} tokens, {load}: {requests} answers in {seconds:.1} s, TTFT {ttft}{errors}")
    }
}

/// All rows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    pub rows: Vec<Row>,
}

/// p50, p90 and p99 as cells.
fn cells(quantiles: Option<Spread>) -> [String; 3] {
    let Some(Spread { median, p90, p99, .. }) = quantiles else { return ["-"; 3].map(str::to_owned) };
    [median, p90, p99].map(|value| format!("{value:.2}"))
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let mut table = Table::new(
            &[
                "server", "load", "prompt", "answer", "requests", "errors", "TTFT p50", "p90", "p99 ms", "ITL p50",
                "p90", "p99 ms", "tokens/s",
            ],
            2,
        );
        for row in &self.rows {
            let mut line = vec![row.server.clone(), row.load.clone(), row.prompt_tokens.to_string()];
            line.extend([row.output_tokens.to_string(), row.requests.to_string(), row.errors.to_string()]);
            line.extend(cells(row.ttft_ms));
            line.extend(cells(row.itl_ms));
            line.push(format!("{:.1}", row.tokens_per_second));
            table.row(line);
        }
        std::iter::once(table.titled("what clients waited for")).chain(self.hand_off()).collect()
    }

    /// What else is to be said.
    pub fn notes(&self) -> Vec<String> {
        let missed: usize = self.rows.iter().map(|row| row.hand_offs_missed).sum();
        let mut notes = Vec::new();
        if missed > 0 {
            let why = self.rows.iter().find_map(|row| row.hand_offs_missed_example.as_deref()).unwrap_or_default();
            notes.push(format!(
                "records of {missed} transfers could not be read, so the hand-off's part is not told for them: {why}"
            ));
        } else if self.rows.iter().all(|row| row.hand_off.is_none()) {
            notes.push("no records of hand-offs: plain workers, or a connector that keeps none".to_owned());
        }
        notes
    }
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for row in &self.rows {
            let Row { server, prompt_tokens, output_tokens, load, .. } = row;
            let name = format!("serve {server}: {prompt_tokens} tokens to {output_tokens}, {load}");
            let is_machine = server == "baseline";
            let without = (!is_machine).then(|| self.without_pd(row)).flatten();
            let mut add = |what: &str, spread: Option<Spread>, control: Option<Spread>| {
                let figure = |spread| Figure::new(format!("{name}, {what}"), Unit::Milliseconds, spread);
                let control = control.map(|control| control.median);
                figures.extend(spread.map(|spread| figure(spread).beside(control).of_machine(is_machine)));
            };
            add("time to the first token", row.ttft_ms, without.and_then(|row| row.ttft_ms));
            add("between tokens", row.itl_ms, without.and_then(|row| row.itl_ms));
            let hand_off = row.hand_off.as_ref();
            add("hand-off's wait", hand_off.map(|hand_off| hand_off.wait_ms), None);
            add("hand-off's copy", hand_off.map(|hand_off| hand_off.copy_ms), None);
            add("hand-off's validation", hand_off.map(|hand_off| hand_off.validate_ms), None);
        }
        figures
    }

    /// The same load at the server without PD.
    fn without_pd(&self, row: &Row) -> Option<&Row> {
        let same = |other: &&Row| {
            let shape = |row: &Row| (row.prompt_tokens, row.output_tokens, row.load.clone());
            other.server == "baseline" && shape(other) == shape(row)
        };
        self.rows.iter().find(same)
    }

    /// The hand-off, where there are records of it.
    fn hand_off(&self) -> Option<Table> {
        let with_records = || self.rows.iter().filter_map(|row| Some((row, row.hand_off.as_ref()?)));
        with_records().next()?;
        let mut table = Table::new(
            &[
                "hand-off",
                "path",
                "dispatch",
                "prompt",
                "transfers",
                "MiB each",
                "wait p50",
                "p99 ms",
                "copy p50",
                "p99 ms",
                "validate p50",
                "p99 ms",
                "of TTFT p50",
            ],
            2,
        );
        for (row, hand_off) in with_records() {
            let paths: Vec<&str> = hand_off.paths.keys().map(String::as_str).collect();
            let dispatches: Vec<&str> = hand_off.dispatches.keys().map(String::as_str).collect();
            let mut line =
                vec![row.load.clone(), paths.join(", "), dispatches.join(", "), row.prompt_tokens.to_string()];
            line.extend([hand_off.transfers.to_string(), format!("{:.2}", hand_off.bytes_mean / f64::from(1 << 20))]);
            for part in [hand_off.wait_ms, hand_off.copy_ms, hand_off.validate_ms] {
                line.extend([format!("{:.2}", part.median), format!("{:.2}", part.p99)]);
            }
            line.push(format!("{:.1} %", hand_off.share_of_ttft.median * 100.0));
            table.row(line);
        }
        Some(table.titled("the hand-off, from the records"))
    }
}
