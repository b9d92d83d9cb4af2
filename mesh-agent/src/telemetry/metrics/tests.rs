use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[test]
fn scrapes_at_the_same_time_only_raise_what_the_kernel_counts() {
    let metrics = Metrics::new();
    let kernel = AtomicU64::new(0);
    let shown = || metrics.capture_events.with_label_values(&["redirected"]).get();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    metrics.set_capture_events(|| vec![("redirected", kernel.fetch_add(1, Ordering::Relaxed))]);
                }
            });
        }
    });
    assert_eq!(shown(), kernel.load(Ordering::Relaxed) - 1);
    // Programs that were loaded anew.
    metrics.set_capture_events(|| vec![("redirected", 3)]);
    assert_eq!(shown(), 3);
    assert!(metrics.render().contains("# TYPE mesh_capture_events_total counter"));
}
