//! The page itself: a frame without data, which its script fills from the events. Everything is in it; nothing comes from
//! elsewhere.

use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The page; `nonce` names its script and its style as its own.
pub(super) fn page(nonce: &str) -> String {
    let whole = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "pdlink" }
                link rel="icon" href="data:,";
                style nonce=(nonce) { (PreEscaped(STYLE)) }
            }
            body {
                a.skip href="#fleet" { "To the fleet" }
                header {
                    h1 { "pdlink" }
                    p #about { "Waiting for the first picture" }
                    p.live { span #live data-state="waiting" { "connecting" } }
                    button #pause type="button" aria-pressed="false" { "Pause" }
                }
                noscript { p.warn { "This page needs its script. The same picture as JSON: " a href="admin/overview" { "admin/overview" } "." } }
                p.sr #said role="status" aria-live="polite" {}
                main {
                    (balance())
                    (totals())
                    (fleet())
                    (rates())
                    (links())
                    (failures())
                }
                script nonce=(nonce) { (PreEscaped(SCRIPT)) }
            }
        }
    };
    whole.into_string()
}

fn balance() -> Markup {
    html! {
        section.balance aria-labelledby="balance-title" {
            h2 #balance-title { "Balance" }
            p #hint data-kind="idle" { "…" }
            div.loads { (load("prefill")) (load("decode")) }
        }
    }
}

fn load(pool: &str) -> Markup {
    html! {
        p.load data-pool=(pool) {
            span.pool { (pool) } " "
            meter min="0" max="1" value="0" aria-label={ (pool) " utilisation" } {}
            " " span.words { "–" }
        }
    }
}

fn totals() -> Markup {
    let tiles = [
        ("inflight", "Requests in flight"),
        ("requests", "Requests per second"),
        ("waiting", "Requests that wait"),
        ("transfers", "Transfers in flight"),
        ("moved", "KV moved, GB/s"),
        ("held", "Blocks held"),
        ("weights", "Weight version"),
    ];
    html! {
        section aria-labelledby="now-title" {
            h2 #now-title { "Now" }
            dl.tiles { @for (id, name) in tiles { div { dt { (name) } dd id=(id) { "–" } } } }
            p.warn #weights-failure hidden {}
        }
    }
}

fn fleet() -> Markup {
    html! {
        section #fleet aria-labelledby="fleet-title" tabindex="-1" {
            h2 #fleet-title { "Fleet" }
            p.soft {
                "Choose a worker to see all of it, and only its links and failures. Escape shows all again. "
                span #paths {}
            }
            div.map #map {
                svg.wires #wires aria-hidden="true" {}
                section.pool data-role="prefill" aria-label="Prefill workers" { h3 { "Prefill" } ul {} }
                section.pool data-role="decode" aria-label="Decode workers" { h3 { "Decode" } ul {} }
            }
            section.chosen #chosen hidden aria-labelledby="chosen-title" {
                h3 #chosen-title {}
                dl.facts {}
                button #all type="button" { "Show all" }
            }
        }
    }
}

fn rates() -> Markup {
    html! {
        section aria-labelledby="rates-title" {
            h2 #rates-title { "Lately" }
            div.plots {
                figure { figcaption { "KV moved, GB/s" } svg #plot-moved role="img" viewBox="0 0 480 150" {} }
                figure { figcaption { "Requests in flight" span.key { " and waiting" } } svg #plot-requests role="img" viewBox="0 0 480 150" {} }
            }
        }
    }
}

fn links() -> Markup {
    html! {
        section aria-labelledby="links-title" {
            h2 #links-title { "Links" }
            div.scroll tabindex="0" role="region" aria-label="Links" {
                table #links aria-labelledby="links-title" {
                    thead { tr {
                        @for name in ["Prefill", "Decode", "Path"] { th.word scope="col" { (name) } }
                        @for name in ["GB/s", "Transfers", "Failed", "GB", "wait ms", "copy ms", "validate ms"] { th scope="col" { (name) } }
                    } }
                    tbody {}
                }
            }
            p.soft #no-links {}
        }
    }
}

fn failures() -> Markup {
    html! {
        section aria-labelledby="failures-title" {
            h2 #failures-title { "Last failures" }
            div.scroll tabindex="0" role="region" aria-label="Last failures" {
                table #failures aria-labelledby="failures-title" {
                    thead { tr { @for name in ["When", "Times", "What", "Worker", "Cause"] { th.word scope="col" { (name) } } } }
                    tbody {}
                }
            }
            p.soft #no-failures { "None so far." }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_all_that_it_needs_and_asks_nobody_else() {
        let page = page("0123");
        for elsewhere in ["http://", "https://", "src=", "@import", "url("] {
            let found = page.replace("http://www.w3.org/2000/svg", "").contains(elsewhere);
            assert!(!found, "the page names something elsewhere: {elsewhere}");
        }
        assert!(page.contains("<script nonce=\"0123\">") && page.contains("<style nonce=\"0123\">"));
        assert!(!page.contains("style=\"") && !page.contains("onclick"), "its policy forbids these");
        assert!(!SCRIPT.contains("innerHTML") && !SCRIPT.contains("eval("), "workers' words must stay words");
    }
}
