//! Text as it leaves: stop strings are found also where they are spread over several tokens, and never shown by halves.

/// The text side of one answer.
#[derive(Debug, Clone, Default)]
pub(super) struct OutputText {
    stops: Vec<String>,
    include_stop: bool,
    /// Text that may still turn out to be the beginning of a stop string.
    held: String,
}

/// What one more token brought.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Pushed {
    /// Text that can be shown now.
    pub text: String,
    /// The stop string that ended the answer.
    pub stopped: Option<String>,
}

impl OutputText {
    /// Empty stop strings are ignored.
    pub(super) fn new(stops: &[String], include_stop: bool) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, include_stop, held: String::new() }
    }

    /// Adds a token's text. Without `check` (before `min_tokens`) stop strings are not looked for.
    pub(super) fn push(&mut self, piece: &str, check: bool) -> Pushed {
        self.held.push_str(piece);
        if !check {
            return Pushed { text: std::mem::take(&mut self.held), stopped: None };
        }
        if let Some((at, stop)) = self.first_stop() {
            let end = if self.include_stop { at + stop.len() } else { at };
            let text = self.held[..end].to_owned();
            self.held.clear();
            return Pushed { text, stopped: Some(stop) };
        }
        let keep = self.undecided();
        let held = self.held.split_off(self.held.len() - keep);
        Pushed { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// The answer ends for another reason: what was held back is text after all.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn first_stop(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)));
        found.min_by_key(|(at, _)| *at).map(|(at, stop)| (at, stop.clone()))
    }

    /// Length of the longest end of the text that begins a stop string.
    fn undecided(&self) -> usize {
        let begins = |stop: &String| {
            (1..stop.len()).rev().find(|&len| stop.is_char_boundary(len) && self.held.ends_with(&stop[..len]))
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_across_tokens_and_never_shown_by_halves() {
        // (name, stop strings, include, pieces, text after each piece, stop that ended it, text at the end)
        type Case = (
            &'static str,
            &'static [&'static str],
            bool,
            &'static [&'static str],
            &'static [&'static str],
            Option<&'static str>,
            &'static str,
        );
        let cases: &[Case] = &[
            ("none", &[], false, &["a", "b"], &["a", "b"], None, ""),
            ("whole in one piece", &["X"], false, &["aXb"], &["a"], Some("X"), ""),
            ("over three pieces", &["abc"], false, &["x", "a", "b", "c"], &["x", "", "", ""], Some("abc"), ""),
            ("included", &["abc"], true, &["x", "a", "b", "c"], &["x", "", "", "abc"], Some("abc"), ""),
            ("not after all", &["abc"], false, &["a", "b", "d"], &["", "", "abd"], None, ""),
            ("restarts inside itself", &["aab"], false, &["a", "a", "a", "b"], &["", "", "a", ""], Some("aab"), ""),
            ("held at the end", &["abc"], false, &["z", "a", "b"], &["z", "", ""], None, "ab"),
            ("earliest wins", &["cd", "b"], false, &["abcd"], &["a"], Some("b"), ""),
            ("empty stop is ignored", &[""], false, &["a"], &["a"], None, ""),
            ("multi-byte", &["é!"], false, &["caf", "é", "?"], &["caf", "", "é?"], None, ""),
        ];
        for (name, stops, include, pieces, texts, stopped, rest) in cases {
            let stops: Vec<_> = stops.iter().map(ToString::to_string).collect();
            let mut output = OutputText::new(&stops, *include);
            let mut last = None;
            for (piece, text) in pieces.iter().zip(*texts) {
                let pushed = output.push(piece, true);
                assert_eq!(pushed.text, *text, "case: {name}, piece {piece:?}");
                last = pushed.stopped;
            }
            assert_eq!(last.as_deref(), *stopped, "case: {name}");
            assert_eq!(output.finish(), *rest, "case: {name}");
        }
    }

    #[test]
    fn before_min_tokens_nothing_stops() {
        let mut output = OutputText::new(&["a".into()], false);
        assert_eq!(output.push("a", false), Pushed { text: "a".into(), stopped: None });
        assert_eq!(output.push("a", true).stopped.as_deref(), Some("a"));
    }
}
