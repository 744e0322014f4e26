use super::*;

pub(crate) fn all() -> Vec<Schedule> {
    vec![
        Schedule::LogLinear,
        Schedule::Square,
        Schedule::SquareRoot,
        Schedule::Logarithmic,
        Schedule::cosine(1e-3).unwrap(),
        Schedule::gaussian(0.5, 0.2).unwrap(),
        Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, false).unwrap(),
    ]
}

/// A schedule through 513 of its own points: even in log t near 0 and in log(1 − t) near 1.
pub(crate) fn tabulated(schedule: &Schedule) -> Schedule {
    const POINTS: usize = 513;
    let (low, high) = ((1e-4f64).ln(), (1e8f64).ln());
    let level = |i: usize| {
        let odds = low + (high - low) * i as f64 / (POINTS - 1) as f64;
        1.0 / (1.0 + (-odds).exp())
    };
    let levels = (0..POINTS).map(level);
    let mut points = vec![(0.0, schedule.mask_prob(0.0))];
    points.extend(levels.map(|t| (t, schedule.mask_prob(t))));
    points.push((1.0, 1.0));
    Schedule::Table(Arc::new(Table::new(&points).unwrap()))
}

/// The stated error of a table of 513 points on [1e-3, 1): of p, w, the inverse and w there.
#[test]
fn a_tabulated_schedule_agrees_with_itself() {
    for schedule in all() {
        let table = tabulated(&schedule);
        let exact = matches!(schedule.name(), "loglinear" | "square" | "square_root");
        let tolerance = if exact { 1e-7 } else { 1e-4 };
        for i in 0..4_000 {
            // Even in log t, then in log(1 − t).
            let u = f64::from(i % 2_000) / 2_000.0;
            let t = match i < 2_000 {
                true => (1e-3f64).powf(1.0 - u),
                false => 1.0 - (1e-6f64).powf(u) * 0.999,
            };
            let (p, w) = (schedule.mask_prob(t), schedule.loss_weight(t));
            let close = |name: &str, got: f64, want: f64, tolerance: f64| {
                let error = (got / want - 1.0).abs();
                assert!(
                    error < tolerance,
                    "{} {name} at {t}: {error:e}",
                    schedule.name()
                );
            };
            close("p", table.mask_prob(t), p, 1e-6);
            close("w", table.loss_weight(t), w, tolerance);
            close("t", table.inverse(p).unwrap(), t, 1e-6);
            close("w at p", table.loss_weight_at(p).unwrap(), w, tolerance);
        }
        assert_eq!(table.mask_prob(1.0), 1.0);
        assert_eq!(table.mask_prob(0.0), schedule.mask_prob(0.0));
        assert_eq!(table.inverse(1.0).unwrap(), 1.0);
        assert_eq!(table.inverse(schedule.mask_prob(0.0)).unwrap(), 0.0);
    }
}

/// Three points and a kink: w is the slope of the very p that is drawn, and t(p) undoes it.
#[test]
fn a_coarse_table_is_a_schedule_of_its_own() {
    let coarse = |points: &[(f64, f64)]| Schedule::Table(Arc::new(Table::new(points).unwrap()));
    for table in [
        coarse(&[(0.0, 0.0), (0.5, 0.9), (1.0, 1.0)]),
        coarse(&[(0.0, 0.2), (0.1, 0.25), (0.2, 0.9), (0.3, 0.91), (1.0, 1.0)]),
    ] {
        let mut before = table.mask_prob(0.0);
        for i in 1..1000 {
            let (t, h) = (f64::from(i) / 1000.0, 1e-7);
            let p = table.mask_prob(t);
            assert!(p > before, "{p} after {before} at {t}");
            before = p;
            let slope = (table.mask_prob(t + h) - table.mask_prob(t - h)) / (2.0 * h);
            let (got, want) = (table.loss_weight(t), slope / p);
            assert!(
                (got - want).abs() < 1e-4 * (1.0 + want),
                "{t}: {got} {want}"
            );
            // As far as p, whose rounding is 1e-16, tells one t from the next.
            let back = (table.inverse(p).unwrap() - t).abs();
            assert!(back < 1e-9 + 1e-15 / slope.max(1e-14), "{t}: {back}");
        }
    }
}

#[test]
fn points_that_are_no_table_name_themselves() {
    let refused = |points: &[(f64, f64)]| Table::new(points).unwrap_err().to_string();
    let end = (1.0, 1.0);
    for (points, sentence) in [
        (vec![(0.0, 0.0), end], "2 points: must be three or more"),
        (
            vec![(0.1, 0.0), (0.5, 0.5), end],
            "t from 0.1 to 1: must be t from 0 to 1",
        ),
        (vec![(0.0, -0.1), (0.5, 0.5), end], "p(0) = -0.1: must be 0"),
        (vec![(0.0, f64::NAN), (0.5, 0.5), end], "p(0) = NaN"),
        (
            vec![(0.0, 0.0), (0.5, 0.5), (1.0, 0.75)],
            "a mass of 0.25 is missing",
        ),
        (vec![(0.0, 0.0), (0.5, 0.5), (1.0, f64::NAN)], "p(1) = NaN"),
        (
            vec![(0.0, 0.0), (0.5, 0.5), (0.6, 0.5), end],
            "(0.6, 0.5) after (0.5, 0.5)",
        ),
        (
            vec![(0.0, 0.0), (0.5, 0.5), (0.5, 0.6), end],
            "strictly increasing",
        ),
        (
            vec![(0.0, 0.0), (0.5, f64::NAN), end],
            "strictly increasing",
        ),
        (
            vec![(0.0, 0.0), (0.5, 1.0), (1.0, 1.0 + 1e-10)],
            "strictly increasing",
        ),
    ] {
        let message = refused(&points);
        assert!(message.contains(sentence), "{message}");
    }
}

/// Every name makes a schedule of that name.
#[test]
fn names_are_those_of_the_schedules() {
    for name in Schedule::NAMES {
        let settings = ScheduleSettings {
            name: name.into(),
            eps: None,
            mu: Some(0.3),
            sigma: Some(0.2),
            mu2: Some(0.8),
            sigma2: Some(0.2),
            mixture: Some(0.6),
            paper_weights: false,
            points: Some(vec![(0.0, 0.0), (0.5, 0.3), (1.0, 1.0)]),
        };
        assert_eq!(settings.build().unwrap().name(), name);
    }
}

#[test]
fn weight_is_the_slope_over_the_probability() {
    for schedule in all() {
        for i in 1..100 {
            let (t, h) = (f64::from(i) / 100.0, 1e-5);
            let slope = (schedule.mask_prob(t + h) - schedule.mask_prob(t - h)) / (2.0 * h);
            let expected = slope / schedule.mask_prob(t);
            let got = schedule.loss_weight(t);
            assert!(
                (got / expected - 1.0).abs() < 1e-5,
                "{} at {t}: {got} against {expected}",
                schedule.name()
            );
        }
    }
}

#[test]
fn many_levels_are_the_same_bits() {
    let t: Vec<f64> = (1..=50).map(|i| f64::from(i) / 50.0).collect();
    for schedule in all() {
        let (mut p, mut w) = (vec![0.0; 50], vec![0.0; 50]);
        schedule.fill(&t, &mut p, &mut w);
        for i in 0..50 {
            assert_eq!(p[i].to_bits(), schedule.mask_prob(t[i]).to_bits());
            assert_eq!(w[i].to_bits(), schedule.loss_weight(t[i]).to_bits());
        }
    }
}

#[test]
fn weight_at_a_mask_probability_is_that_of_its_level() {
    for schedule in all() {
        for i in 1..100 {
            let t = f64::from(i) / 100.0;
            let got = schedule.loss_weight_at(schedule.mask_prob(t)).unwrap();
            let error = got / schedule.loss_weight(t) - 1.0;
            assert!(error.abs() < 1e-7, "{} at {t}: {error}", schedule.name());
        }
    }
    // Ten deviations out, where 1 − t has no digits left: √(2π)·σ·Z·e^50, Z = 1/2.
    let steep = Schedule::gaussian(0.0, 0.1).unwrap();
    let want = (2.0 * std::f64::consts::PI).sqrt() * 0.05 * 50f64.exp();
    assert!((steep.loss_weight_at(1.0).unwrap() / want - 1.0).abs() < 1e-9);
}

#[test]
fn inverse_undoes_mask_prob() {
    for schedule in all() {
        for i in 1..100 {
            let t = f64::from(i) / 100.0;
            let back = schedule.inverse(schedule.mask_prob(t)).unwrap();
            assert!((back - t).abs() < 1e-10, "{} at {t}", schedule.name());
        }
    }
}

/// p(t) near its ends and under Gaussians far from (0, 1), from 60-digit arithmetic.
#[test]
fn thin_tails_keep_their_digits() {
    for (mu, sigma, t, p) in [
        (0.5, 0.2, 1e-6, 1.126_761_974_264_682e-5),
        (-1.0, 0.15, 0.5, 0.015_156_072_289_390_1),
        (-1.0, 0.15, 1.0 - 1e-6, 0.269_376_820_822_647_1),
        (2.0, 0.15, 1e-6, 0.730_623_179_176_85),
    ] {
        let got = Schedule::gaussian(mu, sigma).unwrap();
        let error = got.mask_prob(t) / p - 1.0;
        assert!(
            error.abs() < 1e-9,
            "mu = {mu}, sigma = {sigma}, t = {t}: {error}"
        );
        let back = got.inverse(p).unwrap() / t - 1.0;
        assert!(
            back.abs() < 1e-9,
            "mu = {mu}, sigma = {sigma}, t = {t}: {back}"
        );
    }
    let cosine = Schedule::cosine(1e-3).unwrap();
    let above = cosine.mask_prob(1e-6) - 1e-3; // (1 − ε)(π·10⁻⁶)²/8
    assert!(
        (above / 1.232_466_849_585_78e-12 - 1.0).abs() < 1e-6,
        "{above}"
    );
    assert!((cosine.inverse(cosine.mask_prob(1e-3)).unwrap() / 1e-3 - 1.0).abs() < 1e-9);
}

#[test]
fn ends_at_one() {
    for schedule in all() {
        assert!(
            (schedule.mask_prob(1.0) - 1.0).abs() < 1e-12,
            "{}",
            schedule.name()
        );
    }
}

/// docs/math.md §2: the printed form covers the NELBO exactly twice: ∫ w(t) g(p(t)) dt.
#[test]
fn paper_form_counts_twice() {
    let integral = |schedule: &Schedule| -> f64 {
        let n = 20_000;
        (0..n)
            .map(|i| {
                let t = (f64::from(i) + 0.5) / f64::from(n);
                let p = schedule.mask_prob(t);
                schedule.loss_weight(t) * p * p // g(p) = p²: ∫ p dp = 1/2
            })
            .sum::<f64>()
            / f64::from(n)
    };
    let ours = Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, false).unwrap();
    let paper = Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, true).unwrap();
    assert!((integral(&ours) - 0.5).abs() < 1e-3);
    assert!((integral(&paper) - 1.0).abs() < 1e-3);
    assert!(paper.inverse(0.5).is_err());
}

#[test]
fn bad_parameters_name_themselves() {
    assert!(
        Schedule::gaussian(0.5, 0.0)
            .unwrap_err()
            .to_string()
            .contains("sigma = 0")
    );
    assert!(
        Schedule::gaussian(50.0, 0.1)
            .unwrap_err()
            .to_string()
            .contains("mu = 50")
    );
    assert!(Schedule::cosine(1.0).is_err());
    let bimodal = |second, mixture| {
        let made = Schedule::bimodal((0.3, 0.2), second, mixture, false);
        made.unwrap_err().to_string()
    };
    assert!(bimodal((0.8, 0.2), 1.0).contains("mixture = 1"));
    assert!(bimodal((0.8, 0.0), 0.5).contains("sigma2 = 0"));
}
